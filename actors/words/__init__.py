"""Sub-floor a: the messages and errors that every other room speaks."""
