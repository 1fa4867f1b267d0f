"""Floor 0, what was asked: the Config, its files, and nothing else."""
