"""Bytes that ranks send: the worked example, conservation over ranks by playing the rings through, monotony."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep2tp.planner.communication import (
    all_gather,
    all_reduce,
    deduplicated_all_to_all,
    expected_distinct_ranks,
    expected_remote_ranks,
    gather_scatter,
    moe_layer,
    padded_tokens,
    reduce_scatter,
    sent_bytes,
)
from ep2tp.planner.straggler import group_sizes

HIDDEN, TOKENS, RANKS, EXPERTS, TOP_K = 7168, 64, 4, 256, 8


def test_the_worked_example() -> None:
    """docs/planning.md: hidden 7168, 64 tokens, 4 GPUs, 256 experts, top 8, BF16."""
    [reduced] = moe_layer(TOKENS, HIDDEN, RANKS, 1)
    assert reduced.kind == "all_reduce"
    assert reduced.sent == 2 * 3 / 4 * 64 * 7168 * 2 == 1_376_256
    dispatched = moe_layer(TOKENS, HIDDEN, RANKS, 4)
    assert [c.kind for c in dispatched] == ["all_gather", "reduce_scatter"]
    assert sent_bytes(dispatched) == 1_376_256
    assert sent_bytes(deduplicated_all_to_all(TOKENS, HIDDEN, RANKS, EXPERTS, TOP_K)) == pytest.approx(
        1.24e6, rel=0.005
    )


def test_the_textbook_volumes_of_the_worked_example() -> None:
    """N x hidden x tokens x 2 bytes each way for EP, hidden x tokens x 2 for TP: eight times as much."""
    dispatch, reduced = RANKS * HIDDEN * TOKENS * 2, HIDDEN * TOKENS * 2
    assert (dispatch, reduced) == (3_670_016, 917_504)
    assert 2 * dispatch / reduced == 8
    assert 2 * dispatch / 32e3 == pytest.approx(229, abs=1)  # microseconds at PCIe Gen4's 32 GB/s
    assert 2 * dispatch / 1.8e6 == pytest.approx(4.1, abs=0.1)  # at NVLink 5's 1.8 TB/s
    [real] = moe_layer(TOKENS, HIDDEN, RANKS, 1)
    for real_sent in (real.sent, sent_bytes(moe_layer(TOKENS, HIDDEN, RANKS, 4))):
        assert real_sent / reduced == 1.5
    assert sent_bytes(deduplicated_all_to_all(TOKENS, HIDDEN, RANKS, EXPERTS, TOP_K)) < real.sent


def test_fp8_dispatch_halves_one_direction() -> None:
    size = (TOKENS, HIDDEN, RANKS, EXPERTS, TOP_K)
    plain, packed = deduplicated_all_to_all(*size), deduplicated_all_to_all(*size, dispatch_bytes=1 + 4 / 128)
    assert packed[0].sent == pytest.approx(plain[0].sent * (1 + 4 / 128) / 2)
    assert packed[1].sent == plain[1].sent


@given(ranks=st.integers(2, 16), chunks=st.integers(1, 5))
def test_a_ring_played_through_sends_what_the_formula_says(ranks: int, chunks: int) -> None:
    """Every rank starts with its own values; after the ring all hold the sum, and each sent as many as computed."""
    size = ranks * chunks
    values = [[rank * 100 + i for i in range(size)] for rank in range(ranks)]
    expected = [sum(column) for column in zip(*values, strict=True)]
    sent = [0] * ranks
    for phase in ("reduce", "gather"):
        for step in range(ranks - 1):
            moved = []
            for rank in range(ranks):
                part = (rank - step + (phase == "gather")) % ranks
                span = slice(part * chunks, (part + 1) * chunks)
                moved.append(((rank + 1) % ranks, span, values[rank][span]))
                sent[rank] += chunks
            for target, span, data in moved:
                kept = values[target][span]
                values[target][span] = [a + b for a, b in zip(kept, data, strict=True)] if phase == "reduce" else data
    assert all(held == expected for held in values)
    assert all(count == pytest.approx(all_reduce(size, ranks, "").sent) for count in sent)
    both = all_gather(size, ranks, "").sent + reduce_scatter(size, ranks, "").sent
    assert both == pytest.approx(all_reduce(size, ranks, "").sent)


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(256, 8, 4), (128, 8, 8), (10, 3, 4), (16, 1, 8)])
def test_distinct_ranks_agree_with_sampling(experts: int, top_k: int, ranks: int) -> None:
    chance = random.Random(3)
    sizes = group_sizes(experts, ranks)
    owner = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    draws, distinct, remote = 20_000, 0, 0
    for _ in range(draws):
        hit = {owner[expert] for expert in chance.sample(range(experts), top_k)}
        distinct += len(hit)
        remote += len(hit - {chance.randrange(ranks)})
    assert expected_distinct_ranks(sizes, top_k) == pytest.approx(distinct / draws, rel=0.01)
    assert expected_remote_ranks(experts, top_k, ranks) == pytest.approx(remote / draws, rel=0.02)


@given(tokens=st.integers(1, 4096), ranks=st.integers(2, 64), hidden=st.integers(1, 8192))
def test_volumes_are_monotone(tokens: int, ranks: int, hidden: int) -> None:
    for parallel in (1, ranks):
        here = sent_bytes(moe_layer(tokens, hidden, ranks, parallel))
        assert here <= sent_bytes(moe_layer(tokens + 1, hidden, ranks, parallel))
        assert here < sent_bytes(moe_layer(tokens, hidden + 1, ranks, parallel))
        assert here <= 2 * padded_tokens(tokens, ranks) * hidden * 2  # never twice what every rank ends up with
    assert sent_bytes(moe_layer(tokens, hidden, ranks, 1)) <= sent_bytes(moe_layer(tokens, hidden, ranks + 1, 1))


@given(top_k=st.integers(1, 16), ranks=st.integers(2, 16), tokens=st.integers(1, 512))
def test_deduplication_sends_at_most_a_copy_a_rank(top_k: int, ranks: int, tokens: int) -> None:
    found = deduplicated_all_to_all(tokens, 128, ranks, 256, top_k)
    each = padded_tokens(tokens, ranks) // ranks * 128 * 2
    for collective in found:
        assert 0 < collective.sent <= each * min(top_k, ranks - 1) + 1e-6
    more = deduplicated_all_to_all(tokens, 128, ranks, 256, top_k + 1)
    assert sent_bytes(found) <= sent_bytes(more)
    assert sent_bytes(found) <= sent_bytes(gather_scatter(tokens, 128, ranks)) + 1e-6


def test_one_rank_sends_nothing() -> None:
    assert moe_layer(64, 7168, 1, 1) == []
