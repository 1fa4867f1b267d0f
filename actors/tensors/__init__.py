"""Sub-floor c: tensors without Ray: the model, its layers, the cache, the sampler."""
