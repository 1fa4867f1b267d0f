"""The CPU backend: kernels compiled by numba for products, attention, norms and sampling."""
