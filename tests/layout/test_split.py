"""Where a dimension is cut: whole blocks, no gap, no overlap, and never more padding than any other way needs."""

from __future__ import annotations

import doctest
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep2tp.layout import split
from ep2tp.layout.split import Split, least_padded, refine, round_up

SIZES = st.integers(1, 20_000)
BLOCKS = st.sampled_from([1, 2, 3, 8, 16, 24, 32, 64, 96, 128, 256])
RANKS = st.integers(1, 16)


def least_by_search(size: int, ranks: int, needs: list[tuple[int, int]]) -> int:
    """The least value from ``size`` up, one after the other, that suits every need."""
    value = size
    while any(times * value % (ranks * block) for times, block in needs):
        value += 1
    return value


@given(SIZES, BLOCKS, RANKS)
def test_slices_are_equal_and_hold_whole_blocks(size: int, block: int, ranks: int) -> None:
    cut = Split.of_blocks(size, block, ranks)
    widths = {stop - start for start, stop in map(cut.bounds, range(ranks))}
    assert widths == {cut.per_rank}
    assert cut.per_rank % block == 0
    assert all(start % block == 0 for start, _ in map(cut.bounds, range(ranks)))


@given(SIZES, BLOCKS, RANKS)
def test_slices_cover_the_padded_size_once(size: int, block: int, ranks: int) -> None:
    cut = Split.of_blocks(size, block, ranks)
    bounds = [cut.bounds(rank) for rank in range(ranks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == cut.padded
    assert all(before[1] == after[0] for before, after in pairwise(bounds))


@given(st.integers(1, 2_000), BLOCKS, RANKS)
def test_real_parts_cover_the_size_once_and_are_the_slices_cut_at_it(size: int, block: int, ranks: int) -> None:
    cut = Split.of_blocks(size, block, ranks)
    held = [value for rank in range(ranks) for value in range(*cut.real_bounds(rank))]
    assert held == list(range(size))
    for rank in range(ranks):
        start, stop = cut.bounds(rank)
        assert list(range(*cut.real_bounds(rank))) == [value for value in range(start, stop) if value < size]


@given(SIZES, BLOCKS, RANKS)
def test_padding_is_the_least_possible(size: int, block: int, ranks: int) -> None:
    assert Split.of_blocks(size, block, ranks).padded == least_by_search(size, ranks, [(1, block)])


@given(SIZES, BLOCKS, RANKS)
def test_exactness_and_overhead_tell_of_the_padding(size: int, block: int, ranks: int) -> None:
    cut = Split.of_blocks(size, block, ranks)
    assert cut.is_exact == (size % (ranks * block) == 0)
    assert cut.overhead == pytest.approx((cut.padded - size) / size)
    assert (cut.overhead == 0) == cut.is_exact


@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_round_up_is_the_next_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple


@given(
    st.integers(1, 5_000),
    RANKS,
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 8, 16, 32, 64, 128])), min_size=1, max_size=3),
)
def test_least_padded_is_the_least_that_suits_every_need(size: int, ranks: int, needs: list[tuple[int, int]]) -> None:
    assert least_padded(size, ranks, needs) == least_by_search(size, ranks, needs)


def test_least_padded_of_no_need_pads_nothing() -> None:
    assert least_padded(1408, 7, []) == 1408


@given(SIZES, BLOCKS, RANKS)
def test_refined_blocks_divide_the_block_and_an_even_slice(size: int, block: int, ranks: int) -> None:
    refined = refine(size, block, ranks)
    if size % ranks:
        assert refined is None
        return
    common = [b for b in range(1, block + 1) if block % b == 0 and size // ranks % b == 0]
    assert refined == max(common)


@pytest.mark.parametrize(
    ("size", "block", "ranks", "padded", "per_rank"),
    [
        (1408, 128, 2, 1536, 768),
        (1408, 128, 8, 2048, 256),
        (1536, 128, 8, 2048, 256),
        (1536, 64, 8, 1536, 192),
        (768, 128, 4, 1024, 256),
        (2304, 32, 16, 2560, 160),
        (2880, 32, 8, 3072, 384),
        (2048, 128, 3, 2304, 768),
        (1, 128, 16, 2048, 128),
    ],
)
def test_published_shapes(size: int, block: int, ranks: int, padded: int, per_rank: int) -> None:
    cut = Split.of_blocks(size, block, ranks)
    assert (cut.padded, cut.per_rank) == (padded, per_rank)


def test_a_rank_past_the_end_of_the_values_holds_padding_alone() -> None:
    cut = Split.of_blocks(1536, 128, 8)
    assert [cut.real_bounds(rank) for rank in (5, 6, 7)] == [(1280, 1536), (1536, 1536), (1536, 1536)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 8, 2), "size=0"),
        ((8, 0, 2), "padded=0"),
        ((8, 8, 0), "ranks=0"),
        ((8, 8, -1), "ranks=-1"),
        ((8, 6, 2), "padded=6: must be a multiple of ranks=2, at least size=8"),
        ((8, 9, 2), "padded=9: must be a multiple of ranks=2"),
    ],
    ids=str,
)
def test_what_is_no_split_is_refused(values: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(*values)


@pytest.mark.parametrize(("size", "block", "ranks"), [(8, 0, 2), (8, -128, 2), (8, 2, 0), (0, 2, 2), (-8, 2, 2)])
def test_splits_of_nothing_are_refused(size: int, block: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Split.of_blocks(size, block, ranks)


@pytest.mark.parametrize("rank", [-1, 4, 100])
def test_a_rank_outside_is_refused(rank: int) -> None:
    cut = Split.of_blocks(1408, 128, 4)
    for bounds in (cut.bounds, cut.real_bounds):
        with pytest.raises(ValueError, match=rf"rank={rank}: must be in 0\.\.3"):
            bounds(rank)


def test_the_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(split).failed == 0
