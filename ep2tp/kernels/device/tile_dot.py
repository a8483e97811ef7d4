"""Products on tensor cores: a tile of weights ``[rows, columns]`` times inputs of several tokens ``[columns, pairs]``.

Weights come first, so that they fill the 16-row side of the matrix instructions and a few tokens the 8-wide one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.dequant import byte_values, nibble_values
from ep2tp.kernels.device.fp8_dot import load_quantised, multiply_quantised
from ep2tp.kernels.device.scales import load_scales
from ep2tp.kernels.device.slice_dot import load_slices, multiply_slices


@triton.jit
def no_sums(ROWS: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr):
    """What :func:`multiply_tile` starts from."""
    if SLICES > 1:
        sums = tl.zeros([SLICES, ROWS, PAIRS], tl.float32)
    else:
        sums = tl.zeros([ROWS, PAIRS], tl.float32)
    return sums


@triton.jit
def total(sums, SLICES: tl.constexpr):
    """``[rows, pairs]`` of what :func:`multiply_tile` came to."""
    if SLICES > 1:
        sums = tl.sum(sums, axis=0)
    return sums


@triton.jit
def load_columns(
    inputs, start, live, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, PACK: tl.constexpr, SLICES: tl.constexpr,
    INPUT_BITS: tl.constexpr,
):  # fmt: skip
    """Inputs ``[stored columns, pairs]`` of the even and the odd columns (the same where unpacked), or of slices.

    Inputs of 8 bits come with their scales instead.

    ``inputs`` points at the first column of each pair; pairs that are not live read zeros.
    """
    if PACK == 2:
        column = start + tl.arange(0, COLUMNS // 2)[:, None, None] * 2 + tl.arange(0, 2)[None, None, :]
        mask = (column < LENGTH) & live[None, :, None]
        even, odd = tl.split(tl.load(inputs[None, :, None] + column, mask=mask, other=0.0))
    elif INPUT_BITS == 8:
        even, odd = load_quantised(inputs, start, live, LENGTH, COLUMNS)
    elif SLICES > 1:
        even = load_slices(inputs, start, live, LENGTH, COLUMNS, SLICES)
        odd = even
    else:
        column = start + tl.arange(0, COLUMNS)[:, None]
        even = tl.load(inputs[None, :] + column, mask=(column < LENGTH) & live[None, :], other=0.0)
        odd = even
    return even, odd


@triton.jit
def multiply_tile(
    sums, values, scales, row_starts, scale_starts, live, factor, start, even, odd,
    LENGTH: tl.constexpr, KIND: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PACK: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, INPUT_BITS: tl.constexpr,
):  # fmt: skip
    """``sums + weights[:, start : start + COLUMNS] @ inputs``. FP8's scales multiply sums, others the weights."""
    if INPUT_BITS == 8:
        sums = multiply_quantised(
            sums, values, scales, row_starts, scale_starts, live, factor, start, even, odd,
            LENGTH, BLOCK_COLUMNS, BITS, COLUMNS,
        )  # fmt: skip
    elif SLICES > 1:
        sums = multiply_slices(
            sums, values, scales, row_starts, scale_starts, live, factor, start, even,
            LENGTH, KIND, BLOCK_COLUMNS, BITS, COLUMNS, SLICES,
        )  # fmt: skip
    else:
        stored_column = start // PACK + tl.arange(0, COLUMNS // PACK)
        mask = live[:, None] & (stored_column < LENGTH // PACK)[None, :]
        pointers = values + row_starts[:, None] + stored_column[None, :]
        stored = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
        if PACK == 2:
            groups: tl.constexpr = COLUMNS // BLOCK_COLUMNS
            group = start // BLOCK_COLUMNS + tl.arange(0, groups)
            group_mask = live[:, None] & (group * BLOCK_COLUMNS < LENGTH)[None, :]
            scale = load_scales(scales + scale_starts[:, None] + group[None, :], group_mask, factor, KIND, BITS)
            spread = tl.broadcast_to(scale[:, :, None], [ROWS, groups, BLOCK_COLUMNS // 2])
            scale = tl.reshape(spread, [ROWS, COLUMNS // 2])
            low, high = nibble_values(stored, KIND)
            sums = tl.dot((low * scale).to(even.dtype), even, sums)
            sums = tl.dot((high * scale).to(even.dtype), odd, sums)
        else:
            if KIND == "bf16":
                weights = stored
            else:  # by way of float32: straight to BF16 is one slow instruction a value on SM90
                weights = byte_values(stored, KIND, BITS).to(even.dtype)
            if (KIND == "bf16") or (BLOCK_COLUMNS == 0):
                sums = tl.dot(weights, even, sums)
            elif BLOCK_COLUMNS >= COLUMNS:
                scale = load_scales(scales + scale_starts + start // BLOCK_COLUMNS, live, factor, KIND, BITS)
                sums += tl.dot(weights, even) * scale[:, None]
            else:
                # Several blocks in a tile: one product each, of inputs that are zero outside it. Tensor cores idle.
                block = tl.arange(0, COLUMNS)[:, None] // BLOCK_COLUMNS
                for index in tl.static_range(COLUMNS // BLOCK_COLUMNS):
                    column = tl.minimum(start + index * BLOCK_COLUMNS, LENGTH - 1)  # past the end, weights are zeros
                    scale = load_scales(scales + scale_starts + column // BLOCK_COLUMNS, live, factor, KIND, BITS)
                    part = tl.dot(weights, tl.where(block == index, even, 0.0).to(even.dtype))
                    sums += part * scale[:, None]
    return sums
