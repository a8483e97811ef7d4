"""A tensor of the source, in one piece or as the slices of several files, read by bytes in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ep2tp.checkpoint.header import StoredTensor
from ep2tp.errors import CheckpointError
from ep2tp.model.dtypes import item_bytes

WINDOW = 8 << 20
"""Bytes that one worker reads at a time."""


@dataclass(frozen=True)
class Origin:
    """A tensor and where its bytes are.

    Attributes:
        tensor: name, dtype and shape as the new checkpoint has them before padding.
        parts: the stored tensors that make it up.
        axis: the axis along which the parts lie one after the other: 0 or 1.
        copies: stored tensors that must equal the only part, byte for byte.
    """

    tensor: StoredTensor
    parts: tuple[StoredTensor, ...]
    axis: int = 0
    copies: tuple[StoredTensor, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """Bytes of one row of each part; a part that is contiguous in the whole is one row."""
        if self.axis == 0:
            return tuple(part.size for part in self.parts)
        return tuple(part.shape[1] * item_bytes(part.dtype) for part in self.parts)


class InputFile:
    """Reads a file mostly forwards through one window of memory, and hashes it on the way.

    Args:
        path: the file.
        window: bytes held in memory, and the most that :meth:`view` gives.
        hashes: whether :meth:`digest` will be asked for.
    """

    def __init__(self, path: str, window: int = WINDOW, hashes: bool = True) -> None:
        self.path, self.hashes = path, hashes
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._opened = os.fstat(self._file)
        self._size = self._opened.st_size
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._buffer = memoryview(bytearray(window))
        self._start = self._stop = 0
        self._hash, self._hashed = sha256(), 0

    def view(self, start: int, size: int) -> memoryview:
        """``size`` bytes, at most the window, valid until the next call.

        Raises:
            CheckpointError: the file has become shorter than it was.
        """
        if not self._start <= start <= start + size <= self._stop:
            self._load(start, size)
        return self._buffer[start - self._start : start - self._start + size]

    def digest(self) -> str:
        """SHA-256 of the whole file; reads what has not been read."""
        while self._hashed < self._size:
            self._load(self._hashed, 1)
        return self._hash.hexdigest()

    def check_unchanged(self) -> None:
        """Check that nobody wrote to the file while it was read.

        Raises:
            CheckpointError: somebody did.
        """
        now = os.fstat(self._file)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise CheckpointError(f"{self.path}: was changed while it was read; run the command again")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _load(self, start: int, size: int) -> None:
        while self.hashes and self._hashed < start:
            self._load(self._hashed, 1)
        kept = self._stop - start if self._start <= start < self._stop else 0
        self._buffer[:kept] = self._buffer[start - self._start : start - self._start + kept]
        self._start, self._stop = start, start + kept
        while self._stop < min(start + len(self._buffer), self._size):
            read = self._read(start)
            if read == 0:
                break
            self._stop += read
        if self._stop < start + size:
            raise CheckpointError(f"{self.path}: ends at byte {self._stop}, {start + size} are needed; was it changed?")
        if self.hashes and start <= self._hashed < self._stop:
            self._hash.update(self._buffer[self._hashed - start : self._stop - start])
            self._hashed = self._stop

    def _read(self, start: int) -> int:
        """Read on, into the window that begins at ``start``; returns how many bytes."""
        try:
            return os.preadv(self._file, [self._buffer[self._stop - start :]], self._stop)
        except OSError as error:  # of a file that is open, so it does not name it
            raise OSError(error.errno, error.strerror, self.path) from None


def open_inputs(stack: ExitStack, paths: Mapping[str, Path]) -> dict[str, InputFile]:
    """Open the files of one job; a single file is hashed."""
    files = {name: InputFile(str(path), hashes=len(paths) == 1) for name, path in paths.items()}
    for file in files.values():
        stack.callback(file.close)
    return files


def step_of(origin: Origin, row: int) -> int:
    """How many bytes of a tensor to read at a time: whole rows of ``row`` bytes where they are small."""
    row = max(row, sum(origin.rows) if len(origin.parts) > 1 and origin.axis else 1)
    return WINDOW // row * row if 0 < row <= WINDOW // 2 else WINDOW // 2


def read(origin: Origin, files: Mapping[str, InputFile], start: int, size: int) -> memoryview[Any]:
    """``size`` bytes of a tensor from byte ``start``; at most :data:`WINDOW`.

    Raises:
        CheckpointError: a copy of the tensor holds other bytes.
    """
    if len(origin.parts) == 1:
        part = origin.parts[0]
        data = files[part.file.name].view(part.offset + start, size)
        for copy in origin.copies:
            if not np.array_equal(files[copy.file.name].view(copy.offset + start, size), data):
                raise CheckpointError(
                    f"{copy.file}: {copy.name}: differs from the one in {part.file.name}, which should be the same; "
                    "the checkpoint is damaged"
                )
        return data
    row = sum(origin.rows)
    joined = np.empty(size, np.uint8)
    done = 0
    while done < size:
        index, column = divmod(start + done, row)
        count = (size - done) // row if column == 0 else 0
        if count:
            _read_rows(origin, files, index, joined[done : done + count * row].reshape(count, row))
            done += count * row
        else:
            stop = min(row, column + size - done)
            _read_columns(origin, files, index, column, joined[done : done + stop - column])
            done += stop - column
    return joined.data


def _read_rows(origin: Origin, files: Mapping[str, InputFile], index: int, block: np.ndarray[Any, Any]) -> None:
    column = 0
    for part, width in zip(origin.parts, origin.rows, strict=True):
        file, at = files[part.file.name], part.offset + index * width
        data = np.frombuffer(file.view(at, len(block) * width), np.uint8)
        block[:, column : column + width] = data.reshape(len(block), width)
        column += width


def _read_columns(
    origin: Origin, files: Mapping[str, InputFile], index: int, start: int, block: np.ndarray[Any, Any]
) -> None:
    stop, column = start + len(block), 0
    for part, width in zip(origin.parts, origin.rows, strict=True):
        first, last = max(start, column), min(stop, column + width)
        if first < last:
            at = part.offset + index * width + first - column
            view = files[part.file.name].view(at, last - first)
            block[first - start : last - start] = np.frombuffer(view, np.uint8)
        column += width
