"""Attention over a paged KV cache: what a step must know, the cache, and attention written out."""
