"""Locks on files. The system lets go of them when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ep2tp.errors import CheckpointError


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a file's lock; the file is made where there is none.

    Whoever holds it alone may remove the file as the last thing done under the lock: a process that had it open by then
    finds that the name is gone, or another file's, and starts over.

    Args:
        path: the file, in a folder that exists.
        shared: several may hold it at a time, all of them with this argument.
        wait: wait for it.

    Raises:
        BlockingIOError: another holds it, and ``wait`` is not set.
        CheckpointError: the file cannot be made, or its file system has no locks.
    """
    handle = _take(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        os.close(handle)


def _take(path: Path, operation: int) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; ep2tp needs a folder that it can write to") from None
        try:
            fcntl.flock(handle, operation)
            if _is_named(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError as error:
            os.close(handle)
            raise CheckpointError(
                f"{path}: cannot be locked ({error.strerror}), and without locks two processes could spoil each "
                "other's output; mount this file system with locks, or name a folder on another"
            ) from None
        os.close(handle)


def _is_named(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
