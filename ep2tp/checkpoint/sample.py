"""How long a conversion will take, from a measured sample of the disk that it writes to."""

from __future__ import annotations

import os
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from ep2tp.checkpoint.destination import existing_parent

_SAMPLE = 64 << 20  # bytes


def seconds_for(size: int, destination: Path) -> float:
    """Seconds to hash twice and write ``size`` bytes where ``destination`` is to be, from writing a nameless file.

    Reading is not part of the sample: on a disk it overlaps with writing, and a slower source shows in the progress.
    """
    data = os.urandom(1 << 20)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=existing_parent(destination)) as file:
        for _ in range(_SAMPLE // len(data)):
            sha256(data).digest()
            sha256(data).digest()
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return size * (time.perf_counter() - started) / _SAMPLE
