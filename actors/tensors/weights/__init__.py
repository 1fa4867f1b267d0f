"""Checkpoints: where they are, what their files hold, and how a rank reads only its own slices of them."""
