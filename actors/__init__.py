"""Floor 2, what runs on the ranks: words, decisions, tensors, remote (lowest first)."""
