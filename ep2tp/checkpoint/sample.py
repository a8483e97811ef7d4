"""How long a conversion will take, from measured samples of the disks and of this machine's hashing."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from ep2tp.checkpoint.conversion import Conversion
from ep2tp.checkpoint.destination import existing_parent
from ep2tp.errors import CheckpointError

_SAMPLE = 64 << 20  # bytes
_BLOCK = 1 << 20


def seconds_for(conversion: Conversion, source: Path, destination: Path, workers: int) -> float:
    """Seconds that a conversion will take: the disks' time or the cores', whichever is longer.

    The disks' is reading everything and then writing everything, as on one disk; the cores' is SHA-256 of both, on as
    many as there are workers. Reading counts only where ``source`` is a folder: nothing is fetched for a sample.

    Raises:
        CheckpointError: a disk is full or fails.
    """
    new, old = sum(conversion.sizes().values()), conversion.source_bytes
    inputs = [source / name for job in conversion.jobs for name in job.inputs]
    place = existing_parent(destination)
    try:
        disks = new / _rate(lambda data: _write(data, place))
        if source.is_dir():
            largest = max(inputs, key=lambda path: path.stat().st_size)
            disks += old / _rate(lambda _: _read(largest))
    except OSError as error:
        raise CheckpointError(f"{error.filename or place}: {error.strerror} while a sample was measured") from None
    cores = (old + new) / _rate(_hash) / min(workers, os.cpu_count() or 1)
    return max(disks, cores)


def _rate(work: Callable[[bytes], int]) -> float:
    """Bytes a second."""
    data = os.urandom(_BLOCK)
    started = time.perf_counter()
    done = work(data)
    return done / (time.perf_counter() - started)


def _write(data: bytes, folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_SAMPLE // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _SAMPLE


def _read(path: Path) -> int:
    """Read the start of a file from its disk; what the kernel holds of it is given back first."""
    done = 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, _SAMPLE, os.POSIX_FADV_DONTNEED)
        while done < _SAMPLE and (block := file.read(_BLOCK)):
            done += len(block)
    return done


def _hash(data: bytes) -> int:
    digest = sha256()
    for _ in range(_SAMPLE // len(data)):
        digest.update(data)
    return _SAMPLE
