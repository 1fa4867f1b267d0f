"""The step channel, the rank, the gang of all ranks, and the engine that drives them."""
