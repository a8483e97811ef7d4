"""How fast weights can be read from a folder: bounded, past the page cache, writing nothing."""

from __future__ import annotations

import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ep2tp.doctor.finding import Finding, Level

CHECK = "disk"
LIMIT_S, LIMIT_BYTES = 3.0, 4 << 30
_CHUNK = 16 << 20
_SMALLEST, _SLOW = 64 << 20, 0.5e9


@dataclass(frozen=True)
class Speed:
    """A measured read.

    Attributes:
        bytes_per_second: of one sequential reader.
        is_direct: whether the page cache was bypassed; if not, part of the file may have come from memory.
    """

    bytes_per_second: float
    is_direct: bool


def check_disk(folder: Path | None) -> Iterator[Finding]:
    """One finding for the folder's largest file."""
    if folder is None:
        yield Finding(CHECK, Level.UNCHECKED, "read speed: no folder was named", "", "ep2tp doctor --folder MODEL")
        return
    problems: list[OSError] = []
    largest, size = max(_files(folder, problems.append), key=lambda found: found[1], default=(folder, 0))
    if size < _SMALLEST:
        yield _nothing_to_read(folder, problems)
        return
    try:
        speed = read_speed(largest)
    except OSError as error:
        yield _unreadable(largest, error)
        return
    rate = speed.bytes_per_second
    cached = "" if speed.is_direct else " (through the page cache, so it may be slower when cold)"
    what = f"{largest.name} reads at {rate / 1e9:.2f} GB/s{cached}: 100 GB take {100e9 / rate:.0f} s"
    if rate < _SLOW:
        why = "every rank reads the checkpoint, and the engine starts when the last has it"
        do = "a local NVMe disk, or ep2tp reshard --layout ranks: each rank reads its own bytes"
        yield Finding(CHECK, Level.DEGRADED, what, why, do)
    else:
        yield Finding(CHECK, Level.OK, what)


def _files(folder: Path, report: Callable[[OSError], None]) -> Iterator[tuple[Path, int]]:
    """Regular files below a folder, with their sizes; calls ``report`` with what keeps one from being looked at."""
    for parent, _, names in os.walk(folder, onerror=report):
        for path in (Path(parent, name) for name in names):
            try:
                status = path.stat()
            except OSError as error:
                report(error)
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status.st_size


def _nothing_to_read(folder: Path, problems: Sequence[OSError]) -> Finding:
    if problems:
        return _unreadable(Path(problems[0].filename), problems[0])
    what = f"{folder}: no file of {_SMALLEST >> 20} MiB or more to read"
    return Finding(CHECK, Level.UNCHECKED, what, "", "name a model's folder")


def _unreadable(path: Path, error: OSError) -> Finding:
    what = f"read speed: {path} cannot be read ({error.strerror})"
    why = "an engine that this user starts cannot read it either"
    return Finding(CHECK, Level.UNCHECKED, what, why, "see who may read it, and whether its disk is well (dmesg)")


def read_speed(path: Path, limit_s: float = LIMIT_S, limit_bytes: int = LIMIT_BYTES) -> Speed:
    """Read a file's beginning until one of the limits, with O_DIRECT where the file system takes it.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return _read(path, os.O_DIRECT, limit_s, limit_bytes)
    except OSError:
        return _read(path, 0, limit_s, limit_bytes)


def _read(path: Path, flags: int, limit_s: float, limit_bytes: int) -> Speed:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        if not flags:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(-1, _CHUNK) as buffer:  # page-aligned, as O_DIRECT wants it
            total, start = 0, time.monotonic()
            while total < limit_bytes and time.monotonic() - start < limit_s:
                count = os.readv(descriptor, [buffer])
                total += count
                if count < _CHUNK:
                    break
            return Speed(total / max(time.monotonic() - start, 1e-9), bool(flags))
    finally:
        os.close(descriptor)
