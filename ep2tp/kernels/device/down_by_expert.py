"""Second pass where tokens share experts: a program multiplies one tile of one expert with all of its pairs.

Each pair's weighted part is written in float32; ``combine`` sums them, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep2tp.kernels.device.routing import own_expert, pairs_at
from ep2tp.kernels.device.scales import expert_factor, load_scales, scale_rows
from ep2tp.kernels.device.tile_dot import load_columns, multiply_tile, no_sums, total


@triton.jit
def down_by_expert(
    inner, values, scales, global_scales, bias, topk_weights, topk_ids, parts, pairs,
    EXPERTS: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PACK: tl.constexpr,
    BITS: tl.constexpr, WEIGHT_INPUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, INPUT_BITS: tl.constexpr, STAGES: tl.constexpr,
    TILES: tl.constexpr, OVERLAP: tl.constexpr, PAIRS: tl.constexpr, ALL_PAIRS: tl.constexpr, FIND: tl.constexpr,
):  # fmt: skip
    """``parts[pair] = weight * down[expert of pair] @ inner[pair]``. Grid: (experts or pairs, TILES tiles of K)."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    expert, match, place, count, is_ours = own_expert(topk_ids, pairs, EXPERTS, ALL_PAIRS, FIND)
    if is_ours == 0:
        return
    expert = expert.to(tl.int64)
    factor = expert_factor(global_scales, expert, KIND)
    trips: tl.constexpr = (I + COLUMNS - 1) // COLUMNS
    if OVERLAP:
        tl.extra.cuda.gdc_wait()

    for chunk in tl.range(0, count, PAIRS, num_stages=1):
        pair = pairs_at(match, place, chunk, PAIRS, ALL_PAIRS)
        here = chunk + tl.arange(0, PAIRS) < count
        weight = tl.full([PAIRS], 1.0, tl.float32)
        if not WEIGHT_INPUT:
            weight = tl.load(topk_weights + pair, mask=here, other=0.0)
        sums = no_sums(ROWS, PAIRS, SLICES)
        for step in tl.range(0, TILES * trips, num_stages=STAGES):  # loads run on from tile to tile
            start = step % trips * COLUMNS
            outputs = (tl.program_id(1) * TILES + step // trips) * ROWS + tl.arange(0, ROWS)
            live = outputs < K
            scale_starts = scale_rows(expert, outputs, K, I, BLOCK_ROWS, BLOCK_COLUMNS)
            even, odd = load_columns(inner + pair * I, start, here, I, COLUMNS, PACK, SLICES, INPUT_BITS)
            sums = multiply_tile(
                tl.where(start == 0, 0.0, sums), values, scales, (expert * K + outputs) * (I // PACK), scale_starts,
                live, factor, start, even, odd, I, KIND, BLOCK_COLUMNS, PACK, BITS, ROWS, COLUMNS, SLICES, INPUT_BITS,
            )  # fmt: skip
            part = total(sums, SLICES)
            if (KIND == "fp8") and (BLOCK_COLUMNS == 0):
                part *= load_scales(scales + scale_starts, live, factor, KIND, BITS)[:, None]
            if bias is not None:
                part += tl.load(bias + expert * K + outputs, mask=live, other=0.0).to(tl.float32)[:, None]
            is_whole = step % trips == trips - 1
            offset = pair.to(tl.int64)[None, :] * K + outputs[:, None]
            tl.store(parts + offset, part * weight[None, :], mask=live[:, None] & here[None, :] & is_whole)
