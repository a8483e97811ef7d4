"""First pass where tokens share experts: a program multiplies one tile of one expert with all tokens that chose it."""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.activate import activate
from ep2tp.kernels.device.routing import own_expert, pairs_at
from ep2tp.kernels.device.scales import expert_factor, load_scales, scale_rows
from ep2tp.kernels.device.tile_dot import load_columns, multiply_tile, no_sums, total


@triton.jit
def gate_up_by_expert(
    x, values, scales, global_scales, bias, topk_weights, topk_ids, inner, x_stride, pairs,
    EXPERTS: tl.constexpr, K: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PACK: tl.constexpr,
    BITS: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT_INPUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, INPUT_BITS: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr, PAIRS: tl.constexpr, ALL_PAIRS: tl.constexpr, FIND: tl.constexpr,
):  # fmt: skip
    """``inner[pair] = act(gate_up[expert of pair] @ x[token of pair])``. Grid: (experts or pairs, tiles of I)."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    expert, match, place, count, is_ours = own_expert(topk_ids, pairs, EXPERTS, ALL_PAIRS, FIND)
    if is_ours == 0:
        return
    expert = expert.to(tl.int64)
    channels = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = channels < I
    gate_rows = channels * 2 if INTERLEAVED else channels
    up_rows = channels * 2 + 1 if INTERLEAVED else channels + I
    gate_starts = (expert * (2 * I) + gate_rows) * (K // PACK)
    up_starts = (expert * (2 * I) + up_rows) * (K // PACK)
    gate_scales = scale_rows(expert, gate_rows, 2 * I, K, BLOCK_ROWS, BLOCK_COLUMNS)
    up_scales = scale_rows(expert, up_rows, 2 * I, K, BLOCK_ROWS, BLOCK_COLUMNS)
    factor = expert_factor(global_scales, expert, KIND)

    for chunk in tl.range(0, count, PAIRS, num_stages=1):
        pair = pairs_at(match, place, chunk, PAIRS, ALL_PAIRS)
        here = chunk + tl.arange(0, PAIRS) < count
        inputs = x + (pair // TOP_K).to(tl.int64) * x_stride
        gate = no_sums(ROWS, PAIRS, SLICES)
        up = no_sums(ROWS, PAIRS, SLICES)
        for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
            even, odd = load_columns(inputs, start, here, K, COLUMNS, PACK, SLICES, INPUT_BITS)
            gate = multiply_tile(
                gate, values, scales, gate_starts, gate_scales, live, factor, start, even, odd,
                K, KIND, BLOCK_COLUMNS, PACK, BITS, ROWS, COLUMNS, SLICES, INPUT_BITS,
            )  # fmt: skip
            up = multiply_tile(
                up, values, scales, up_starts, up_scales, live, factor, start, even, odd,
                K, KIND, BLOCK_COLUMNS, PACK, BITS, ROWS, COLUMNS, SLICES, INPUT_BITS,
            )  # fmt: skip
        gate = total(gate, SLICES)
        up = total(up, SLICES)
        if (KIND == "fp8") and (BLOCK_COLUMNS == 0):
            gate *= load_scales(scales + gate_scales, live, factor, KIND, BITS)[:, None]
            up *= load_scales(scales + up_scales, live, factor, KIND, BITS)[:, None]
        if WEIGHT_INPUT:
            weight = tl.load(topk_weights + pair, mask=here, other=0.0)[None, :]
            gate *= weight
            up *= weight
        if bias is not None:
            gate += tl.load(bias + expert * (2 * I) + gate_rows, mask=live, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias + expert * (2 * I) + up_rows, mask=live, other=0.0).to(tl.float32)[:, None]
        result = activate(gate, up, CLAMPED).to(inner.dtype.element_ty)
        tl.store(inner + pair[None, :] * I + channels[:, None], result, mask=live[:, None] & here[None, :])
