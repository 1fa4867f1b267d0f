"""Checkpoints: where they are, what their files hold, and reading just the slices of one rank."""
