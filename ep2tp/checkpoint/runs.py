"""What becomes of one tensor's bytes, as rows of runs to copy and padding to fill. Integers and bytes, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from ep2tp.checkpoint.header import StoredTensor
from ep2tp.layout.shard import Cut, Run, padded_shape, rank_shape
from ep2tp.model.dtypes import item_bytes
from ep2tp.model.formats import Fill
from ep2tp.model.sharding import TensorPlan


@dataclass(frozen=True)
class Target:
    """One tensor of a new file, made from one tensor of the source.

    The source's bytes are ``rows`` rows of ``source_row`` bytes. Each becomes a row of ``target_row`` bytes, in which
    ``runs`` (in bytes) are copied and the rest is ``fill``, element by element.

    Attributes:
        check: (position, bytes) that the source must hold, for tensors that are numbers about the others.
        literal: all of the new tensor, where it is no copy.
        cut: (sliced axis, parts) of one rank's slice; None for whole tensors.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: int
    source_row: int
    target_row: int
    runs: tuple[Run, ...]
    fill: bytes = b"\0"
    check: tuple[int, bytes] | None = None
    literal: bytes | None = None
    cut: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Bytes of the new tensor."""
        return self.rows * self.target_row

    @property
    def is_copy(self) -> bool:
        """Whether it is the source's tensor, byte for byte."""
        return self.literal is None and self.source_row == self.target_row == sum(run.count for run in self.runs)


def copied(tensor: StoredTensor) -> Target:
    """The tensor as it is."""
    size = tensor.size
    return Target(tensor.dtype, tensor.shape, 1, size, size, (Run(0, 0, size),))


def padded(tensor: StoredTensor, place: TensorPlan) -> Target:
    """The tensor at its padded size."""
    kind, cut = place.component.fill, place.cut
    if kind is Fill.SHAPE and not place.split.is_exact:
        return _shape_values(tensor, place)
    if cut is None or not place.is_padded:
        return copied(tensor)
    if kind is Fill.GROUP_INDEX:
        return _group_index(tensor, place, 0, cut.padded)
    return _sliced(tensor, place, cut, cut.padded_runs(), padded_shape(tensor.shape, cut))


def of_rank(tensor: StoredTensor, place: TensorPlan, cut: Cut, rank: int) -> Target:
    """One rank's slice of the tensor."""
    if place.component.fill is Fill.GROUP_INDEX and place.is_padded:
        target = _group_index(tensor, place, *cut.split.bounds(rank))
    else:
        target = _sliced(tensor, place, cut, cut.rank_runs(rank), rank_shape(tensor.shape, cut))
    return replace(target, cut=(cut.axis, cut.parts))


def _sliced(tensor: StoredTensor, place: TensorPlan, cut: Cut, runs: Sequence[Run], shape: tuple[int, ...]) -> Target:
    rows = prod(shape[: cut.axis])
    inner = prod(shape[cut.axis + 1 :]) * item_bytes(tensor.dtype)
    in_bytes = tuple(Run(run.source * inner, run.target * inner, run.count * inner) for run in runs)
    return Target(
        tensor.dtype,
        shape,
        rows,
        cut.size * inner,
        shape[cut.axis] * inner,
        in_bytes,
        place.fill(tensor.dtype) if place.is_padded else b"\0",
    )


def _shape_values(tensor: StoredTensor, place: TensorPlan) -> Target:
    """``weight_shape`` of packed integers: the logical [rows, columns]; the intermediate size is rewritten."""
    size = item_bytes(tensor.dtype)
    other, ours = (0, size) if place.matrix.role == "down" else (size, 0)
    before, after = (value.to_bytes(size, "little") for value in (place.split.size, place.split.padded))
    kept = (Run(other, other, size),)
    return Target(tensor.dtype, tensor.shape, 1, 2 * size, 2 * size, kept, after, check=(ours, before))


def _group_index(tensor: StoredTensor, place: TensorPlan, start: int, stop: int) -> Target:
    """``g_idx`` of GPTQ: the number of each column's group."""
    scales = place.format.component(".scales")
    assert scales is not None and scales.cols is not None
    group, size = scales.cols.per, item_bytes(tensor.dtype)

    def values(first: int, last: int) -> bytes:
        return b"".join((column // group).to_bytes(size, "little") for column in range(first, last))

    expected, literal = values(0, tensor.shape[0]), values(start, stop)
    shape = (stop - start,)
    return Target(tensor.dtype, shape, 1, tensor.size, len(literal), (), check=(0, expected), literal=literal)
