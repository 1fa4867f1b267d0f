"""The model of one rank: Transformers' own, asked what it is, pruned to a stage and cut to a shard."""
