"""Products on CUDA cores: tiles ``[rows, units, stored]``, where a unit is what one thread loads (16 bytes, mostly).

One unit's values share a scale, so a thread sums its own products, scales the sum, and keeps one accumulator a unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.dequant import byte_values, nibble_values


@triton.jit
def load_units(rows, columns, mask, STORED: tl.constexpr):
    """Weights ``[rows, units, stored]``, for each use once.

    Triton gives neighbouring threads neighbouring elements of the axis whose addresses run on the longest, and of two
    axes alike the first. The hint puts units before rows, so that a warp reads a run of a row; nothing else reads it.
    """
    pointers = tl.max_contiguous(rows + columns, [1, 2, STORED])
    return tl.load(pointers, mask=mask[:, :, None], other=0, eviction_policy="evict_first")


@triton.jit
def load_inputs(pointers, units, mask, UNIT: tl.constexpr, PACK: tl.constexpr):
    """Inputs of each unit as float32 ``[units, stored]``: of the even and the odd columns (the same where unpacked)."""
    if PACK == 2:
        pair = tl.arange(0, UNIT // 2)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        both = tl.load(pointers + units[:, None, None] * UNIT + pair, mask=mask[:, None, None], other=0.0)
        even, odd = tl.split(both.to(tl.float32))
    else:
        column = units[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        even = tl.load(pointers + column, mask=mask[:, None], other=0.0).to(tl.float32)
        odd = even
    return even, odd


@triton.jit
def unit_sums(stored, even, odd, KIND: tl.constexpr, PACK: tl.constexpr, BITS: tl.constexpr):
    """``[rows, units]``: each unit's sum of unscaled weight times input."""
    if PACK == 2:
        low, high = nibble_values(stored, KIND)
        products = low * even[None, :, :] + high * odd[None, :, :]
    else:
        products = byte_values(stored, KIND, BITS) * even[None, :, :]
    return tl.sum(products, axis=2)
