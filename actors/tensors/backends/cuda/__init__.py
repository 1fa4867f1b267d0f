"""The CUDA backend: paged attention, decode steps over static buffers, CUDA graphs."""
