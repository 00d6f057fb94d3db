"""Numba kernels that transform images on the CPU."""
