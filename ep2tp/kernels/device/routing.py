"""Device functions that find, without a sort, the (token, expert) pairs that an expert has."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_expert(topk_ids, pairs, EXPERTS: tl.constexpr, ALL_PAIRS: tl.constexpr, FIND: tl.constexpr):
    """This program's expert, by the grid's first axis: experts, or (``FIND``) pairs, of which an expert's first counts.

    Returns:
        The expert; which of all pairs are its own, as a mask; each one's place among them; how many; whether the
        expert is known, has a pair and is this program's.
    """
    expert = tl.program_id(0)
    if FIND:
        expert = tl.load(topk_ids + expert).to(tl.int32)
    index = tl.arange(0, ALL_PAIRS)
    match = tl.load(topk_ids + index, mask=index < pairs, other=-1) == expert
    place = tl.cumsum(match.to(tl.int32), 0) - 1
    count = tl.sum(match.to(tl.int32))
    first = tl.min(tl.where(match, index, ALL_PAIRS))
    is_first = (first == tl.program_id(0)) if FIND else (count > 0)
    is_ours = (expert >= 0) & (expert < EXPERTS) & (count > 0) & is_first
    return expert, match, place, count, is_ours


@triton.jit
def pairs_at(match, place, first, PAIRS: tl.constexpr, ALL_PAIRS: tl.constexpr):
    """The pairs at places ``first`` to ``first + PAIRS``; 0 past the last."""
    wanted = first + tl.arange(0, PAIRS)
    hit = match[None, :] & (place[None, :] == wanted[:, None])
    return tl.sum(tl.where(hit, tl.arange(0, ALL_PAIRS)[None, :], 0), axis=1)
