"""Loads of whole-expert plans: exact values, an independent simulation, and figures known from elsewhere."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep2tp.planner.straggler import (
    exact_busiest_of_one_token,
    expected_hits,
    expert_load,
    group_sizes,
    token_load,
)


def simulated(tokens: int, experts: int, top_k: int, groups: int, draws: int) -> tuple[float, float, float, float]:
    """(mean experts hit, busiest, mean pairs, busiest) by plain Python: another generator, another algorithm."""
    chance = random.Random(7)
    owner = [group for group, size in enumerate(group_sizes(experts, groups)) for _ in range(size)]
    samples = []
    for _ in range(draws):
        chosen = [chance.sample(range(experts), top_k) for _ in range(tokens)]
        hit = {expert for token in chosen for expert in token}
        experts_hit, pairs = [0] * groups, [0] * groups
        for expert in hit:
            experts_hit[owner[expert]] += 1
        for token in chosen:
            for expert in token:
                pairs[owner[expert]] += 1
        samples.append((len(hit) / groups, max(experts_hit), tokens * top_k / groups, max(pairs)))
    return tuple(statistics.fmean(column) for column in zip(*samples, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("ranks", "factors"), [(4, {1: 1.77, 4: 1.36, 16: 1.16, 64: 1.05}), (8, {1: 2.57, 4: 1.73, 16: 1.32, 64: 1.09})]
)
def test_known_factors_of_256_experts_top_8(ranks: int, factors: dict[int, float]) -> None:
    for tokens, factor in factors.items():
        assert expert_load(tokens, 256, 8, ranks).factor == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "groups"),
    [(1, 256, 8, 4), (4, 256, 8, 8), (16, 128, 8, 4), (64, 256, 8, 4), (3, 10, 2, 4), (8, 384, 8, 16), (1, 16, 1, 8)],
)
def test_loads_agree_with_another_simulation(tokens: int, experts: int, top_k: int, groups: int) -> None:
    mean_hits, busiest_hits, mean_pairs, busiest_pairs = simulated(tokens, experts, top_k, groups, 3000)
    hits, pairs = (load(tokens, experts, top_k, groups) for load in (expert_load, token_load))
    assert (hits.mean, hits.busiest) == pytest.approx((mean_hits, busiest_hits), rel=0.015)
    assert (pairs.mean, pairs.busiest) == pytest.approx((mean_pairs, busiest_pairs), rel=0.015)


def test_groups_without_an_expert_have_nothing_to_do() -> None:
    """More ranks than experts, as when a small model is planned for many GPUs."""
    assert expert_load(64, 8, 2, 16).busiest == expert_load(64, 8, 2, 8).busiest
    assert token_load(64, 8, 2, 16).busiest == token_load(64, 8, 2, 8).busiest


def test_one_token_exactly() -> None:
    assert exact_busiest_of_one_token([1, 1], 1) == 1
    assert exact_busiest_of_one_token([2, 2], 2) == pytest.approx(2 / 6 * 2 + 4 / 6 * 1)
    assert exact_busiest_of_one_token([4, 4], 8) == 4


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(2, 64),
    data=st.data(),
)
def test_loads_are_bounded_and_conserved(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    groups = data.draw(st.integers(1, experts))
    sizes = group_sizes(experts, groups)
    assert sum(sizes) == experts
    assert max(sizes) - min(sizes) <= 1
    hits, pairs = (load(tokens, experts, top_k, groups) for load in (expert_load, token_load))
    assert hits.mean * groups == pytest.approx(expected_hits(tokens, experts, top_k))
    assert pairs.mean * groups == pytest.approx(tokens * top_k)
    assert hits.mean * 0.97 <= hits.busiest <= min(max(sizes), tokens * top_k) + 1e-9
    assert hits.busiest <= pairs.busiest * 1.03 + 1e-9


@given(experts=st.integers(2, 512), data=st.data())
def test_more_tokens_hit_more_experts(experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    found = [expected_hits(tokens, experts, top_k) for tokens in range(1, 50)]
    assert found[0] == pytest.approx(top_k)
    assert all(a <= b <= experts for a, b in pairwise(found))


def test_the_same_seed_gives_the_same_factor() -> None:
    from ep2tp.planner.straggler import _simulate

    first = expert_load(16, 256, 8, 4)
    _simulate.cache_clear()
    assert expert_load(16, 256, 8, 4) == first
