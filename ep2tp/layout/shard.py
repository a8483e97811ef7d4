"""What becomes of one stored tensor: which run of elements goes where. Integers only, no tensors, no file formats."""

from __future__ import annotations

from dataclasses import dataclass

from ep2tp.layout.split import Split


@dataclass(frozen=True)
class Run:
    """``count`` consecutive elements of an axis, from ``source`` of the stored tensor to ``target`` of the new one."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Cut:
    """The sliced axis of a stored tensor.

    Attributes:
        axis: axis of the stored tensor, from the front.
        split: the split of the axis in stored elements (of one part).
        parts: matrices that lie one after the other on the axis: 2 for gate and up stored as halves of one tensor.
    """

    axis: int
    split: Split
    parts: int = 1

    @property
    def size(self) -> int:
        """Elements of the axis as stored."""
        return self.parts * self.split.size

    @property
    def padded(self) -> int:
        """Elements of the axis after padding."""
        return self.parts * self.split.padded

    def padded_runs(self) -> list[Run]:
        """The runs that fill the padded tensor; what no run covers is padding."""
        size, padded = self.split.size, self.split.padded
        return [Run(part * size, part * padded, size) for part in range(self.parts)]

    def rank_runs(self, rank: int) -> list[Run]:
        """The runs that fill ``rank``'s slice, ``parts * split.per_rank`` elements long; the rest is padding."""
        start, stop = self.split.real_bounds(rank)
        width = self.split.per_rank
        runs = (Run(part * self.split.size + start, part * width, stop - start) for part in range(self.parts))
        return [run for run in runs if run.count]


def padded_shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """``shape`` with the cut axis at its padded length."""
    return (*shape[: cut.axis], cut.padded, *shape[cut.axis + 1 :])


def rank_shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """``shape`` with the cut axis at one rank's length."""
    return (*shape[: cut.axis], cut.parts * cut.split.per_rank, *shape[cut.axis + 1 :])
