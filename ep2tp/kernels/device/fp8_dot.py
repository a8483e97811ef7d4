"""Products of FP8 weights as they are stored with inputs that are quantised to FP8 on the way: no weight is converted.

Each group of inputs, one pair's in one tile's columns, gets a scale of its own. A tile's columns share a weight scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.scales import load_scales


@triton.jit
def load_quantised(inputs, start, live, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """FP8 inputs ``[columns, pairs]`` and their float32 scales ``[pairs]``; pairs that are not live read zeros.

    NaN stays NaN; a group with infinity in it becomes NaN or zeros, and its scale infinite. So no sum hides either.
    """
    column = start + tl.arange(0, COLUMNS)[:, None]
    found = tl.load(inputs[None, :] + column, mask=(column < LENGTH) & live[None, :], other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(found), axis=0), 1e-10) / 448
    return (found / scale[None, :]).to(tl.float8e4nv), scale


@triton.jit
def multiply_quantised(
    sums, values, scales, row_starts, scale_starts, live, factor, start, inputs, input_scales,
    LENGTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``sums + weights[:, start : start + COLUMNS] @ inputs``.

    Tensor cores add up a tile's columns, float32 the tiles.
    """
    column = start + tl.arange(0, COLUMNS)
    mask = live[:, None] & (column < LENGTH)[None, :]
    stored = tl.load(values + row_starts[:, None] + column[None, :], mask=mask, other=0, eviction_policy="evict_first")
    part = tl.dot(stored.to(tl.float8e4nv, bitcast=True), inputs) * input_scales[None, :]
    if BLOCK_COLUMNS > 0:
        scale = load_scales(scales + scale_starts + start // BLOCK_COLUMNS, live, factor, "fp8", BITS)
        part *= scale[:, None]
    return sums + part
