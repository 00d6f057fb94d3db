"""Transforms on the CPU, as Numba kernels."""
