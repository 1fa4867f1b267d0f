"""From logits that are cut by vocabulary to the same ids on every shard, and their log-probabilities."""
