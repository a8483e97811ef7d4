"""Compares one tensor of the source with what became of it, byte for byte, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ep2tp.checkpoint.header import StoredTensor
from ep2tp.checkpoint.origin import InputFile, Origin, read
from ep2tp.errors import DifferenceError
from ep2tp.model.dtypes import item_bytes
from ep2tp.model.formats import Fill
from ep2tp.model.sharding import TensorPlan

BLOCK = 1 << 20
"""Bytes compared at a time."""

Slices = Sequence[tuple[StoredTensor, InputFile]]


@dataclass(frozen=True)
class _Shape:
    """A tensor as [outer, parts, size, inner] (inner in bytes); slices are [outer, parts, width, inner]."""

    outer: int
    parts: int
    size: int
    width: int
    inner: int


def compare_tensor(origin: Origin, files: Mapping[str, InputFile], slices: Slices, place: TensorPlan | None) -> None:
    """Compare a tensor of the source with its slices, one a rank; a single slice is the whole tensor.

    Raises:
        DifferenceError: an element differs, or the padding is not what the format prescribes.
    """
    tensor = origin.tensor
    shape, expected = _shape_of(tensor, place, len(slices))
    for new, _ in slices:
        if (new.dtype, new.shape) != (tensor.dtype, expected):
            raise DifferenceError(
                f"{new.file}: {new.name}: {new.dtype} {list(new.shape)}, expected {tensor.dtype} {list(expected)}"
            )
    kind = place.component.fill if place is not None and not place.split.is_exact else None
    if place is not None and (kind is Fill.SHAPE or (kind is Fill.GROUP_INDEX and place.cut is not None)):
        _compare_numbers(origin, files, slices, place)
        return
    element = np.frombuffer(place.fill(tensor.dtype) if place is not None and place.is_padded else b"\0", np.uint8)
    for outer, count, part, parts, start, stop in _blocks(shape, len(slices)):
        first = ((outer * shape.parts + part) * shape.size + start) * shape.inner
        real = max(min(stop, shape.size) - start, 0)
        size = count * parts * real * shape.inner
        old = np.frombuffer(read(origin, files, first, size) if size else b"", np.uint8)
        old = old.reshape(count, parts, real, shape.inner)
        for rank, (new, file) in enumerate(slices):
            low, high = max(start, rank * shape.width), min(stop, (rank + 1) * shape.width)
            if low >= high:
                continue
            at = ((outer * shape.parts + part) * shape.width + low - rank * shape.width) * shape.inner
            data = np.frombuffer(file.view(new.offset + at, count * parts * (high - low) * shape.inner), np.uint8)
            data = data.reshape(count, parts, high - low, shape.inner)
            values = old[:, :, low - start : high - start]
            if not np.array_equal(data[:, :, : values.shape[2]], values):
                raise DifferenceError(f"{new.file}: {new.name}: differs from the source near byte {at} of its data")
            padding = data[:, :, values.shape[2] :].reshape(-1, len(element))
            if not (padding == element).all():
                raise DifferenceError(f"{new.file}: {new.name}: padding near byte {at} is not {element.tobytes()!r}")


def _shape_of(tensor: StoredTensor, place: TensorPlan | None, slices: int) -> tuple[_Shape, tuple[int, ...]]:
    if place is None or place.cut is None or (slices == 1 and not place.is_padded):
        return _Shape(1, 1, tensor.size, tensor.size, 1), tensor.shape
    axis, parts = place.cut.axis, place.cut.parts
    size, width = place.cut.split.size, place.cut.split.padded // slices
    outer, inner = prod(tensor.shape[:axis]), prod(tensor.shape[axis + 1 :]) * item_bytes(tensor.dtype)
    expected = (*tensor.shape[:axis], parts * width, *tensor.shape[axis + 1 :])
    return _Shape(outer, parts, size, width, inner), expected


def _blocks(shape: _Shape, slices: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(outer, count, part, parts, start, stop) of blocks of about :data:`BLOCK` bytes; start and stop are padded."""
    padded = shape.width * slices
    row = shape.parts * padded * shape.inner
    if 0 < row <= BLOCK:
        step = BLOCK // row
        for outer in range(0, shape.outer, step):
            yield outer, min(step, shape.outer - outer), 0, shape.parts, 0, padded
        return
    step = max(1, BLOCK // max(1, shape.inner))
    for outer in range(shape.outer):
        for part in range(shape.parts):
            for start in range(0, padded, step):
                yield outer, 1, part, 1, start, min(padded, start + step)


def _compare_numbers(origin: Origin, files: Mapping[str, InputFile], slices: Slices, place: TensorPlan) -> None:
    """Compare ``weight_shape`` and ``g_idx``, which are numbers about the other tensors."""
    dtype = {"I32": np.int32, "I64": np.int64}[origin.tensor.dtype]
    old = np.frombuffer(read(origin, files, 0, origin.tensor.size), dtype)
    if place.component.fill is Fill.SHAPE:
        expected = old.copy()
        expected[1 if place.matrix.role == "down" else 0] = place.split.padded
    else:
        scales = place.format.component(".scales")
        assert scales is not None and scales.cols is not None
        expected = np.arange(place.split.padded, dtype=dtype) // scales.cols.per
    new = np.concatenate([np.frombuffer(bytes(file.view(t.offset, t.size)), dtype) for t, file in slices])
    if not np.array_equal(new, expected):
        raise DifferenceError(f"{slices[0][0].file}: {origin.tensor.name}: {new[:4]}..., expected {expected[:4]}...")
