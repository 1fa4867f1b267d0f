"""Running on Ray Serve: the replica, its command, draining, and the errors that Serve reports."""
