"""Device functions that say where scales lie and load them."""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.dequant import scale_value


@triton.jit
def scale_rows(
    expert, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Offset of the first scale of each row of ``expert``'s ``[ROWS, COLUMNS]`` matrix."""
    down: tl.constexpr = (ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS if BLOCK_ROWS > 0 else 1
    across: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS if BLOCK_COLUMNS > 0 else 1
    row = rows // BLOCK_ROWS if BLOCK_ROWS > 0 else rows * 0
    return expert * (down * across) + row * across


@triton.jit
def load_scales(pointers, mask, factor, KIND: tl.constexpr, BITS: tl.constexpr):
    """Scales times ``factor``, NVFP4's number for the whole expert."""
    value = scale_value(tl.load(pointers, mask=mask, other=0), KIND, BITS)
    if KIND == "nvfp4":
        value = value * factor
    return value


@triton.jit
def expert_factor(global_scales, expert, KIND: tl.constexpr):
    """NVFP4's one FP32 scale an expert; 1 in other formats."""
    if KIND == "nvfp4":
        factor = tl.load(global_scales + expert)
    else:
        factor = 1.0
    return factor
