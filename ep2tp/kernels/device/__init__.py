"""Triton device code: kernels, and the functions that they share."""
