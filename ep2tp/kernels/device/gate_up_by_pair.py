"""First pass for a handful of tokens: a program multiplies one token with one tile of one expert, on CUDA cores."""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.activate import activate
from ep2tp.kernels.device.scales import expert_factor, load_scales, scale_rows
from ep2tp.kernels.device.unit_products import load_inputs, load_units, unit_sums


@triton.jit
def gate_up_by_pair(
    x, values, scales, global_scales, bias, topk_weights, topk_ids, inner, x_stride,
    EXPERTS: tl.constexpr, K: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr,
    BITS: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT_INPUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``inner[pair] = act(gate_up[expert of pair] @ x[token of pair])``. Grid: (pairs, tiles of I)."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0)
    expert = tl.load(topk_ids + pair).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    channels = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = channels < I
    gate_rows = channels * 2 if INTERLEAVED else channels
    up_rows = channels * 2 + 1 if INTERLEAVED else channels + I

    stored_columns: tl.constexpr = K // PACK
    units_in_tile: tl.constexpr = COLUMNS // UNIT
    scaled_by_column: tl.constexpr = (KIND != "bf16") and (BLOCK_COLUMNS > 0)
    token_inputs = x + (pair // TOP_K).to(tl.int64) * x_stride
    lane = tl.arange(0, UNIT // PACK)[None, None, :]
    matrix = values + expert * (2 * I * stored_columns)
    gate_pointers = matrix + gate_rows[:, None, None] * stored_columns + lane
    up_pointers = matrix + up_rows[:, None, None] * stored_columns + lane
    # Where all rows of a tile share their scales, one row of them is loaded.
    one_row: tl.constexpr = (BLOCK_ROWS == 0) or ((BLOCK_ROWS % ROWS == 0) and (I % ROWS == 0) and not INTERLEAVED)
    scaled = tl.program_id(1) * ROWS + tl.arange(0, 1 if one_row else ROWS)
    gate_scales = scale_rows(expert, scaled * 2 if INTERLEAVED else scaled, 2 * I, K, BLOCK_ROWS, BLOCK_COLUMNS)
    up_scales = scale_rows(expert, scaled * 2 + 1 if INTERLEAVED else scaled + I, 2 * I, K, BLOCK_ROWS, BLOCK_COLUMNS)
    scaled_live = (scaled < I)[:, None]
    factor = expert_factor(global_scales, expert, KIND)

    gate_sums = tl.zeros([ROWS, units_in_tile], tl.float32)
    up_sums = tl.zeros([ROWS, units_in_tile], tl.float32)
    for start in tl.range(0, K // UNIT, units_in_tile, num_stages=STAGES):
        units = start + tl.arange(0, units_in_tile)
        inside = units < K // UNIT
        mask = live[:, None] & inside[None, :]
        offset = units[None, :, None] * (UNIT // PACK)
        gate_stored = load_units(gate_pointers, offset, mask, UNIT // PACK)
        up_stored = load_units(up_pointers, offset, mask, UNIT // PACK)
        even, odd = load_inputs(token_inputs, units, inside, UNIT, PACK)
        gate_part = unit_sums(gate_stored, even, odd, KIND, PACK, BITS)
        up_part = unit_sums(up_stored, even, odd, KIND, PACK, BITS)
        if scaled_by_column:
            column = (units * UNIT // BLOCK_COLUMNS)[None, :]
            scale_mask = scaled_live & inside[None, :]
            gate_part *= load_scales(scales + gate_scales[:, None] + column, scale_mask, factor, KIND, BITS)
            up_part *= load_scales(scales + up_scales[:, None] + column, scale_mask, factor, KIND, BITS)
        gate_sums += gate_part
        up_sums += up_part
    gate = tl.sum(gate_sums, axis=1)
    up = tl.sum(up_sums, axis=1)
    if (KIND != "bf16") and (BLOCK_COLUMNS == 0):
        gate *= load_scales(scales + gate_scales, scaled < I, factor, KIND, BITS)
        up *= load_scales(scales + up_scales, scaled < I, factor, KIND, BITS)
    if WEIGHT_INPUT:
        weight = tl.load(topk_weights + pair)
        gate *= weight
        up *= weight
    if bias is not None:
        gate += tl.load(bias + expert * (2 * I) + gate_rows, mask=live, other=0.0).to(tl.float32)
        up += tl.load(bias + expert * (2 * I) + up_rows, mask=live, other=0.0).to(tl.float32)
    result = activate(gate, up, CLAMPED)
    tl.store(inner + pair * I + channels, result.to(inner.dtype.element_ty), mask=live)
