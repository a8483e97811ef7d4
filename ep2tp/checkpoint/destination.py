"""Checks a place to write to, and puts files there without copying them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ep2tp.errors import CheckpointError

_FICLONE = 0x40049409  # Linux: share the blocks of another file, copied when one of them is written to
_MARGIN = 64 << 20  # bytes, for the journal and the file system itself
_LONGEST = 255  # bytes of a file's name, on common file systems


def check_destination(source: str | Path, folder: Path) -> None:
    """Check that output and source do not lie in one another, and that the output can be a folder.

    Raises:
        CheckpointError: they do, or it cannot.
    """
    real, origin = folder.resolve(), Path(source).resolve()
    if origin.is_dir() and (real == origin or origin in real.parents or real in origin.parents):
        raise CheckpointError(f"{folder}: the output must not lie in the source {source}, nor the source in it")
    if files := [path for path in (real, *real.parents) if path.exists() and not path.is_dir()]:
        raise CheckpointError(f"{folder}: {files[0]} is not a folder; name another")


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Check that no file's name is too long, also while it is written, when a weight file's holds its rank's too.

    Raises:
        CheckpointError: one is.
    """
    for name in names:
        longest = name.replace("/", "__") if name.endswith(".safetensors") else PurePosixPath(name).name
        if len(os.fsencode(longest)) > _LONGEST:
            raise CheckpointError(f"{folder}: {name}: too long a name; rename the source's file")


def existing_parent(folder: Path) -> Path:
    """The nearest folder above, or the folder itself, that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())


def check_space(folder: Path, needed: int) -> int:
    """Check that ``needed`` bytes can be written to and fit on the disk of ``folder``; returns the bytes free there.

    Raises:
        CheckpointError: they cannot, or do not.
    """
    place = existing_parent(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder}: {place} cannot be written to; name another folder")
    free = shutil.disk_usage(place).free
    if needed and needed + _MARGIN > free:
        raise CheckpointError(
            f"{folder}: {needed / 1e9:.2f} GB are to be written and {place} has {free / 1e9:.2f} GB free; nothing was "
            "written. Make room, or name a folder on another disk"
        )
    return free


def freed_by(paths: Iterable[Path]) -> int:
    """Bytes of disk that are free once files are removed. One that has another name as well frees none."""
    freed = 0
    for path in paths:
        with suppress(FileNotFoundError):  # its process ended it meanwhile
            stat = path.lstat()
            freed += stat.st_size if stat.st_nlink == 1 else 0
    return freed


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
