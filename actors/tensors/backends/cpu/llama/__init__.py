"""Decoder layers of Llama's form on CPU: attention, and whole runs of layers, in one kernel call."""
