"""Sums each token's weighted parts, slot by slot."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(
    parts, topk_ids, out,
    EXPERTS: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``out[token] = sum over slots of parts[token, slot]``; parts of unknown experts were not written."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(topk_ids + token * TOP_K + slot)
        written = tl.where((expert >= 0) & (expert < EXPERTS), K, 0)
        sums += tl.load(parts + (token * TOP_K + slot) * K + columns, mask=columns < written, other=0.0)
    tl.store(out + token * K + columns, sums.to(out.dtype.element_ty), mask=columns < K)
