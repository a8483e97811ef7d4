"""Checks a place to write to, and puts files there without copying them."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from ep2tp.errors import CheckpointError

_FICLONE = 0x40049409  # Linux: share the blocks of another file, copied when one of them is written to
_MARGIN = 64 << 20  # bytes, for tokenizer, index and journal


def check_destination(source: str | Path, folder: Path) -> None:
    """Check that output and source do not lie in one another.

    Raises:
        CheckpointError: they do.
    """
    real, origin = folder.resolve(), Path(source).resolve()
    if origin.is_dir() and (real == origin or origin in real.parents or real in origin.parents):
        raise CheckpointError(f"{folder}: the output must not lie in the source {source}, nor the source in it")


def existing_parent(folder: Path) -> Path:
    """The nearest folder above, or the folder itself, that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())


def check_space(folder: Path, needed: int) -> None:
    """Check that ``needed`` bytes fit on the disk of ``folder``.

    Raises:
        CheckpointError: they do not.
    """
    place = existing_parent(folder)
    free = shutil.disk_usage(place).free
    if needed and needed + _MARGIN > free:
        raise CheckpointError(
            f"{folder}: {needed / 1e9:.2f} GB are to be written and {place} has {free / 1e9:.2f} GB free; nothing was "
            "written. Make room, or name a folder on another disk"
        )


def link_or_clone(source: Path, target: Path) -> None:
    """Give ``source`` a second name without copying its bytes: a clone where the file system can, else a hard link.

    Raises:
        CheckpointError: ``target`` is on another file system.
    """
    target.unlink(missing_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            pass
        else:
            os.fsync(new.fileno())
            return
    target.unlink()
    try:
        target.hardlink_to(source.resolve())
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be linked to {source} ({error.strerror}); name a folder on the same disk"
        ) from None
