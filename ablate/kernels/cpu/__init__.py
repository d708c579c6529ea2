"""The CPU backend: Numba kernels on torch's threads."""
