"""The model of one rank: Transformers' own, described by a probe, pruned to a stage and cut to a shard."""
