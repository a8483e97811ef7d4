"""Tensor-parallel slices in place of whole experts: MoE models on GPUs without NVLink."""

__version__ = "0.1.0"
