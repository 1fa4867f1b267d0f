"""Sampling from logits that are sharded by vocabulary: the same ids on every shard, and their log-probabilities."""
