"""Products on tensor cores of a tile that is cut into slices of its columns, each multiplied by warps of its own.

A tile then has few rows and long runs of them: 16 of 512 columns instead of 64 of 128. A slice has one scale a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.dequant import byte_values
from ep2tp.kernels.device.scales import load_scales


@triton.jit
def _columns(start, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    """``[slices, columns of one]``."""
    size: tl.constexpr = COLUMNS // SLICES
    return start + tl.arange(0, SLICES)[:, None] * size + tl.arange(0, size)[None, :]


@triton.jit
def load_slices(inputs, start, live, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    """Inputs ``[slices, columns of one, pairs]``; pairs that are not live read zeros."""
    column = _columns(start, COLUMNS, SLICES)[:, :, None]
    return tl.load(inputs[None, None, :] + column, mask=(column < LENGTH) & live[None, None, :], other=0.0)


@triton.jit
def multiply_slices(
    sums, values, scales, row_starts, scale_starts, live, factor, start, inputs,
    LENGTH: tl.constexpr, KIND: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BITS: tl.constexpr,
    COLUMNS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """``sums[slice] + weights[:, slice] @ inputs[slice]``: ``[slices, rows, pairs]``."""
    column = _columns(start, COLUMNS, SLICES)[:, None, :]
    mask = live[None, :, None] & (column < LENGTH)
    stored = tl.load(values + row_starts[None, :, None] + column, mask=mask, other=0, eviction_policy="evict_first")
    if KIND == "bf16":
        weights = stored
    else:
        weights = byte_values(stored, KIND, BITS).to(inputs.dtype)
    if (KIND == "bf16") or (BLOCK_COLUMNS == 0):
        sums = tl.dot(weights, inputs, sums)
    else:
        first = tl.minimum(start + tl.arange(0, SLICES) * (COLUMNS // SLICES), LENGTH - 1)  # past the end are zeros
        pointers = scales + scale_starts[None, :] + (first // BLOCK_COLUMNS)[:, None]
        scale = load_scales(pointers, live[None, :], factor, KIND, BITS)
        sums += tl.dot(weights, inputs) * scale[:, :, None]
    return sums
