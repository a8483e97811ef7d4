"""Second pass for a handful of tokens: a program has one token and one tile of outputs, and sums its experts.

The experts' columns are one row of ``top_k * I`` columns, so that all of a program's weights can be loaded at once. The
first tile of weights is loaded before the program waits for the first pass, which wrote none of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.scales import load_scales, scale_rows
from ep2tp.kernels.device.unit_products import load_inputs, load_units, unit_sums


@triton.jit
def _load_tile(
    values, scales, global_scales, topk_weights, topk_ids, token, start, tile,
    EXPERTS: tl.constexpr, K: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr,
    BITS: tl.constexpr, WEIGHT_INPUT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Weights ``[rows, units, stored]`` from unit ``start`` on, what their sums are scaled by, which units are real."""
    stored_columns: tl.constexpr = I // PACK
    outputs = tile * ROWS + tl.arange(0, ROWS)
    units = start + tl.arange(0, UNITS)
    slot = units // (I // UNIT)
    unit = units - slot * (I // UNIT)
    expert = tl.load(topk_ids + token * TOP_K + slot, mask=slot < TOP_K, other=-1).to(tl.int64)
    real = (expert >= 0) & (expert < EXPERTS)

    columns = expert * (K * stored_columns) + unit * (UNIT // PACK)
    rows = outputs[:, None, None] * stored_columns + tl.arange(0, UNIT // PACK)[None, None, :]
    mask = (outputs < K)[:, None] & real[None, :]
    stored = load_units(values + columns[None, :, None], rows, mask, UNIT // PACK)

    factor = tl.full([1, UNITS], 1.0, tl.float32)
    if not WEIGHT_INPUT:
        factor *= tl.load(topk_weights + token * TOP_K + slot, mask=real, other=0.0)[None, :]
    if KIND != "bf16":
        if KIND == "nvfp4":
            factor *= tl.load(global_scales + expert, mask=real, other=0.0)[None, :]
        # Where all rows of a tile share their scales, one row of them is loaded.
        one_row: tl.constexpr = (BLOCK_ROWS == 0) or (BLOCK_ROWS % ROWS == 0)
        scaled = tile * ROWS + tl.arange(0, 1 if one_row else ROWS)
        offset = scale_rows(expert[None, :], scaled[:, None], K, I, BLOCK_ROWS, BLOCK_COLUMNS)
        if BLOCK_COLUMNS > 0:
            offset += (unit * UNIT // BLOCK_COLUMNS)[None, :]
        scale_mask = (scaled < K)[:, None] & real[None, :]
        factor = factor * load_scales(scales + offset, scale_mask, 1.0, KIND, BITS)
    return stored, factor, real


@triton.jit
def down_by_token(
    inner, values, scales, global_scales, bias, topk_weights, topk_ids, out,
    EXPERTS: tl.constexpr, K: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr,
    BITS: tl.constexpr, WEIGHT_INPUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``out[token] = sum over slots of weight * down[expert] @ inner[token, slot]``. Grid: (tokens, tiles of K)."""
    token = tl.program_id(0)
    tile = tl.program_id(1)
    units: tl.constexpr = COLUMNS // UNIT
    all_units: tl.constexpr = TOP_K * (I // UNIT)
    stored, factor, real = _load_tile(
        values, scales, global_scales, topk_weights, topk_ids, token, 0, tile, EXPERTS, K, I, TOP_K,
        KIND, BLOCK_ROWS, BLOCK_COLUMNS, UNIT, PACK, BITS, WEIGHT_INPUT, ROWS, units,
    )  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()

    sums = tl.zeros([ROWS, units], tl.float32)
    for start in tl.range(0, all_units, units, num_stages=1):
        even, odd = load_inputs(inner + token * (TOP_K * I), start + tl.arange(0, units), real, UNIT, PACK)
        sums += unit_sums(stored, even, odd, KIND, PACK, BITS) * factor
        if all_units > units:
            stored, factor, real = _load_tile(
                values, scales, global_scales, topk_weights, topk_ids, token, start + units, tile, EXPERTS, K, I, TOP_K,
                KIND, BLOCK_ROWS, BLOCK_COLUMNS, UNIT, PACK, BITS, WEIGHT_INPUT, ROWS, units,
            )  # fmt: skip
    result = tl.sum(sums, axis=1)
    outputs = tile * ROWS + tl.arange(0, ROWS)
    live = outputs < K
    if bias is not None:
        for slot in tl.static_range(TOP_K):
            expert = tl.load(topk_ids + token * TOP_K + slot).to(tl.int64)
            weight = 1.0 if WEIGHT_INPUT else tl.load(topk_weights + token * TOP_K + slot)
            known = tl.where((expert >= 0) & (expert < EXPERTS), K, 0)
            result += weight * tl.load(bias + expert * K + outputs, mask=outputs < known, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * K + outputs, result.to(out.dtype.element_ty), mask=live)
