"""Floor 3, text and users: HTTP, Serve, jobs, commands."""
