"""Device functions that find, without a sort, the (token, expert) pairs that an expert has."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matching_pairs(topk_ids, expert, pairs, ALL_PAIRS: tl.constexpr):
    """Which of all pairs are this expert's, as a mask, and each one's place among them."""
    index = tl.arange(0, ALL_PAIRS)
    match = tl.load(topk_ids + index, mask=index < pairs, other=-1) == expert
    return match, tl.cumsum(match.to(tl.int32), 0) - 1


@triton.jit
def pairs_at(match, place, first, PAIRS: tl.constexpr, ALL_PAIRS: tl.constexpr):
    """The pairs at places ``first`` to ``first + PAIRS``; 0 past the last."""
    wanted = first + tl.arange(0, PAIRS)
    hit = match[None, :] & (place[None, :] == wanted[:, None])
    return tl.sum(tl.where(hit, tl.arange(0, ALL_PAIRS)[None, :], 0), axis=1)
