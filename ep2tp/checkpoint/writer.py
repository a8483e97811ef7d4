"""Writes one safetensors file: header first, data in order, hashed on the way, under its name only once it is whole."""

from __future__ import annotations

import ctypes
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from ep2tp.errors import CheckpointError

_BUFFER = 1 << 20  # bytes
_WRITEBACK = 64 << 20  # bytes
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


class ShardWriter:
    """A file that grows at its end.

    Args:
        path: its name while it is written, in a folder that exists, on the file system of its final name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._started = 0  # bytes that the disk was told to begin with
        self._hash = sha256()

    def write(self, data: Any) -> None:
        """Append bytes (any contiguous buffer).

        Raises:
            OSError: the disk is full or fails.
        """
        view = memoryview(data).cast("B")
        self.position += len(view)
        if self._filled + len(view) > _BUFFER:
            self._flush()
        if len(view) >= _BUFFER:
            self._put(view)
        else:
            self._view[self._filled : self._filled + len(view)] = view
            self._filled += len(view)

    def fill(self, element: bytes, size: int) -> None:
        """Append ``size`` bytes of one element, repeated."""
        block = element * (min(size, _BUFFER) // len(element))
        while size:
            self.write(block[:size])
            size -= min(size, len(block))

    def commit(self, target: Path) -> tuple[int, str]:
        """Make the file durable and give it its name; returns its (bytes, SHA-256).

        Raises:
            OSError: the disk is full or fails.
        """
        self._flush()
        os.fsync(self._file)
        self.close()
        make_folder(target.parent)
        self.path.rename(target)
        sync_folder(target.parent)
        return self.position, self._hash.hexdigest()

    def close(self) -> None:
        """Close the file; it keeps its temporary name unless it was committed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _flush(self) -> None:
        if self._filled:
            self._put(self._view[: self._filled])
            self._filled = 0

    def _put(self, view: memoryview) -> None:
        self._hash.update(view)
        while view:
            view = view[os.write(self._file, view) :]
        if self.position - self._started >= 2 * _WRITEBACK:
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Let the disk write what it has so far while more is made; otherwise it would begin only at fsync.

        Only a hint: where the system has no sync_file_range (it is Linux's), fsync does all the work.
        """
        if hasattr(_libc, "sync_file_range"):
            start, size = ctypes.c_int64(self._started), ctypes.c_int64(_WRITEBACK)
            _libc.sync_file_range(self._file, start, size, _SYNC_FILE_RANGE_WRITE)
        self._started += _WRITEBACK


def write_file(target: Path, data: bytes, temporary: Path) -> None:
    """Write a small file durably, all or nothing.

    Raises:
        CheckpointError: the disk is full or fails.
    """
    writer = ShardWriter(temporary)
    try:
        writer.write(data)
        writer.commit(target)
    except OSError as error:
        raise CheckpointError(f"{target}: {error.strerror}; what is done so far is kept") from None
    finally:
        writer.close()


def copy_file(source: Path, target: Path, temporary: Path) -> str:
    """Copy a file durably, all or nothing; returns its SHA-256.

    Raises:
        CheckpointError: reading or writing fails.
    """
    writer = ShardWriter(temporary)
    try:
        with source.open("rb") as stream:
            while block := stream.read(_BUFFER):
                writer.write(block)
        return writer.commit(target)[1]
    except OSError as error:
        raise CheckpointError(f"{source} -> {target}: {error.strerror}; what is done so far is kept") from None
    finally:
        writer.close()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably, where they are not there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
