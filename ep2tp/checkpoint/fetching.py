"""Where ``ep2tp verify --stream`` keeps its file of the moment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def fetching_place(root: Path) -> Iterator[Path]:
    """A new folder of this process, removed at the end; never in ``root``, which is proven, not changed.

    It lies in ``TMPDIR`` where that is set, else beside ``root``: the disk of a checkpoint has room for one more file,
    which a ``/tmp`` in memory may not. Where nothing can be written there, the system's temporary folder has to do.
    """
    with _temporary(root.resolve()) as folder:
        yield Path(folder) / "fetched"


def _temporary(root: Path) -> tempfile.TemporaryDirectory[str]:
    prefix = f"{root.name[:32]}.verify-"  # so that one that a killed process left is known
    if "TMPDIR" not in os.environ:
        with suppress(OSError):
            return tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent)
    return tempfile.TemporaryDirectory(prefix=prefix)
