"""Sub-floor d: the channel, the rank, the gang, and the engine that drives them."""
