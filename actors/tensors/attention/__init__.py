"""Attention over a paged KV cache: the metadata of a step, the cache, and the reference in plain torch."""
