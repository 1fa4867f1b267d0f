"""`stagemesh doctor`: whether nodes, links and access are fit to serve, and what to do where they are not."""
