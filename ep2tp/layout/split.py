"""Where one dimension is cut for tensor parallelism. Pure arithmetic on integers, no tensors.

A dimension of ``size`` values, quantised in runs of ``block`` values that share a scale, is held by ``ranks`` ranks in
equal contiguous slices. A slice never cuts a block. Two exact ways:

- *pad*: append zeros until every rank holds the same whole number of blocks (:meth:`Split.of_blocks`);
- *refine*: repeat the scales on a finer grid so that the slices of the unpadded size end on a block (:func:`refine`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm


@dataclass(frozen=True)
class Split:
    """``size`` values, tail-padded to ``padded``, in equal slices over ``ranks`` ranks.

    Example:
        >>> Split.of_blocks(1408, block=128, ranks=2)
        Split(size=1408, padded=1536, ranks=2)
    """

    size: int
    padded: int
    ranks: int

    def __post_init__(self) -> None:
        """Refuse what is not a split.

        Raises:
            ValueError: a number is below 1, ``padded`` is below ``size``, or slices would not be equal.
        """
        for name in ("size", "padded", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.padded < self.size or self.padded % self.ranks:
            raise ValueError(
                f"padded={self.padded}: must be a multiple of ranks={self.ranks}, at least size={self.size}"
            )

    @classmethod
    def of_blocks(cls, size: int, block: int, ranks: int) -> Split:
        """The split into equal slices of whole blocks that pads least.

        Raises:
            ValueError: a number is below 1.
        """
        if block < 1 or ranks < 1:
            raise ValueError(f"block={block}, ranks={ranks}: must be at least 1")
        return cls(size, round_up(size, ranks * block), ranks)

    @property
    def per_rank(self) -> int:
        """Values that each rank holds, padding included."""
        return self.padded // self.ranks

    @property
    def is_exact(self) -> bool:
        """Whether nothing is padded."""
        return self.padded == self.size

    @property
    def overhead(self) -> float:
        """Memory cost of the padding as a share of the unpadded size (0.0 is none)."""
        return self.padded / self.size - 1

    def bounds(self, rank: int) -> tuple[int, int]:
        """First and one-past-last value of ``rank``'s slice of the padded dimension.

        Raises:
            ValueError: ``rank`` is not in ``range(ranks)``.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank={rank}: must be in 0..{self.ranks - 1}")
        return rank * self.per_rank, (rank + 1) * self.per_rank

    def real_bounds(self, rank: int) -> tuple[int, int]:
        """Like :meth:`bounds`, without the padding: both ends are at most ``size``."""
        start, stop = self.bounds(rank)
        return min(start, self.size), min(stop, self.size)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def refine(size: int, block: int, ranks: int) -> int | None:
    """The coarsest block that divides both ``block`` and an even slice of ``size``.

    Repeating each scale ``block // refine(...)`` times lets slices stay even with no padding.

    Returns:
        The refined block, or None where ``size`` does not divide by ``ranks`` at all.

    Example:
        >>> refine(1536, block=128, ranks=8)
        64
    """
    return gcd(block, size // ranks) if size % ranks == 0 else None


def least_padded(size: int, ranks: int, needs: list[tuple[int, int]]) -> int:
    """The least size, not below ``size``, that suits several dimensions derived from one config field.

    Each need is ``(times, block)``: a dimension of ``times`` times the field, in blocks of ``block``, must split into
    equal slices of whole blocks. A routed expert is ``(1, 128)``; the shared experts of a model with two of them,
    stored as one MLP as DeepSeek-V2 does, are ``(2, 128)``.

    Example:
        >>> least_padded(1408, 2, [(1, 128), (2, 128)])
        1536
    """
    step = 1
    for times, block in needs:
        slices = ranks * block
        step = lcm(step, slices // gcd(times, slices))
    return round_up(size, step)
