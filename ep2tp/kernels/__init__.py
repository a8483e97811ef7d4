"""A tensor-parallel fused-MoE kernel for decode. Only this package imports triton."""
