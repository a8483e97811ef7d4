"""The runs that fill padded tensors and ranks' slices: put together with numpy, both say the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep2tp.layout.shard import Cut, Run, padded_shape, rank_shape
from ep2tp.layout.split import Split

np = pytest.importorskip("numpy")

PADDING = -1
CUTS = st.builds(
    lambda size, block, ranks, parts, axis: Cut(axis, Split.of_blocks(size, block, ranks), parts),
    st.integers(1, 400),
    st.sampled_from([1, 2, 4, 8, 16, 32]),
    st.integers(1, 16),
    st.integers(1, 2),
    st.integers(0, 2),
)


def stored_tensor(cut: Cut) -> np.ndarray:
    """A tensor whose every element is another number."""
    shape = [2, 3, 2]
    shape[cut.axis] = cut.size
    return np.arange(np.prod(shape)).reshape(shape)


def filled(stored: np.ndarray, shape: tuple[int, ...], runs: list[Run], axis: int) -> np.ndarray:
    """The new tensor; fails where a run leaves the stored or the new tensor, or writes an element twice."""
    new = np.full(shape, PADDING)
    for run in runs:
        assert run.count > 0
        assert run.source >= 0 and run.source + run.count <= stored.shape[axis]
        assert run.target >= 0 and run.target + run.count <= shape[axis]
        place = [slice(None)] * new.ndim
        place[axis] = slice(run.target, run.target + run.count)
        assert (new[tuple(place)] == PADDING).all()
        source = [slice(None)] * new.ndim
        source[axis] = slice(run.source, run.source + run.count)
        new[tuple(place)] = stored[tuple(source)]
    return new


def padded(cut: Cut) -> np.ndarray:
    stored = stored_tensor(cut)
    return filled(stored, padded_shape(stored.shape, cut), cut.padded_runs(), cut.axis)


@given(CUTS)
def test_each_part_is_padded_at_its_own_tail(cut: Cut) -> None:
    for stored, new in zip(
        np.split(stored_tensor(cut), cut.parts, cut.axis), np.split(padded(cut), cut.parts, cut.axis), strict=True
    ):
        real, padding = np.split(new, [cut.split.size], cut.axis)
        assert (real == stored).all()
        assert (padding == PADDING).all()


@given(CUTS)
def test_all_ranks_together_are_the_padded_tensor(cut: Cut) -> None:
    stored = stored_tensor(cut)
    slices = [
        filled(stored, rank_shape(stored.shape, cut), cut.rank_runs(rank), cut.axis) for rank in range(cut.split.ranks)
    ]
    parts = zip(*(np.split(part, cut.parts, cut.axis) for part in slices), strict=True)
    together = np.concatenate([part for whole in parts for part in whole], cut.axis)
    assert (together == padded(cut)).all()


@given(CUTS)
def test_one_ranks_slice_is_that_of_the_padded_tensor(cut: Cut) -> None:
    stored = stored_tensor(cut)
    for rank in range(cut.split.ranks):
        start, stop = cut.split.bounds(rank)
        parts = [np.take(part, range(start, stop), cut.axis) for part in np.split(padded(cut), cut.parts, cut.axis)]
        held = filled(stored, rank_shape(stored.shape, cut), cut.rank_runs(rank), cut.axis)
        assert (held == np.concatenate(parts, cut.axis)).all()


@given(CUTS)
def test_an_exact_cut_copies_all(cut: Cut) -> None:
    if cut.split.is_exact:
        assert (padded(cut) == stored_tensor(cut)).all()
        assert cut.size == cut.padded


def test_halves() -> None:
    cut = Cut(axis=1, split=Split(6, 8, 2), parts=2)
    assert cut.padded_runs() == [Run(0, 0, 6), Run(6, 8, 6)]
    assert cut.rank_runs(0) == [Run(0, 0, 4), Run(6, 4, 4)]
    assert cut.rank_runs(1) == [Run(4, 0, 2), Run(10, 4, 2)]
    assert padded_shape((5, 12, 7), cut) == (5, 16, 7)
    assert rank_shape((5, 12, 7), cut) == (5, 8, 7)


def test_a_rank_of_padding_alone_copies_nothing() -> None:
    cut = Cut(axis=0, split=Split.of_blocks(1536, 128, 8))
    assert cut.rank_runs(6) == cut.rank_runs(7) == []
    assert rank_shape((1536, 3), cut) == (256, 3)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank}"):
        Cut(0, Split(8, 8, 2)).rank_runs(rank)
