"""Batch generation: every row of a file answered once, in order, however often the job is killed."""
