"""Locks hold where files are removed at the same time, and say so where the file system has none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from threading import Event, Thread

import pytest

from ep2tp.checkpoint import lock
from ep2tp.checkpoint.lock import locked
from ep2tp.errors import CheckpointError


def test_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a lock whose file is removed meanwhile must not hold a file that nobody else can find."""
    path, opened, holds, end = tmp_path / "lock", Event(), Event(), Event()
    real = lock.fcntl.flock

    def flock(handle: int, operation: int) -> None:
        opened.set()
        real(handle, operation)

    def other() -> None:
        with locked(path, wait=True):
            holds.set()
            end.wait(10)

    thread = Thread(target=other)
    with locked(path):
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        thread.start()
        assert opened.wait(10)
        path.unlink()
    try:
        assert holds.wait(10)
        with pytest.raises(BlockingIOError), locked(path):
            pass
    finally:
        end.set()
        thread.join()


def test_several_share_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, shared=True), locked(path, shared=True), pytest.raises(BlockingIOError), locked(path):
        pass
    with locked(path), pytest.raises(BlockingIOError), locked(path, shared=True):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=r"No locks available.*without locks"), locked(tmp_path / "lock"):
        pass
