"""Decoder layers of Llama's form on CPU: attention blocks in a few kernels, runs of layers in one kernel call."""
