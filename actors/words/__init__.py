"""The messages and errors that all other rooms of `actors` share."""
