"""Compares a converted checkpoint's files with the hashes in its manifest, and finds all that differ in one pass."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ep2tp.checkpoint.earlier import STATE
from ep2tp.checkpoint.manifest import Manifest
from ep2tp.errors import DifferenceError


def check_hashes(root: Path, manifest: Manifest, pool: ThreadPoolExecutor, add: Callable[[int], None]) -> None:
    """Check every file against the manifest, and that there are no other weights.

    One that cannot be read is a difference like any other: of a suspect disk, all that can be read is checked.

    Args:
        root: the checkpoint.
        manifest: its own.
        pool: reads the files.
        add: called with the bytes of each weight file that is checked.

    Raises:
        DifferenceError: some differ; names each, in a line of its own.
    """
    expected = {name: output.sha256 for name, output in manifest.outputs.items()} | manifest.files
    found = list(_others(root, manifest))
    differences = pool.map(lambda name: _difference(root / name, expected[name]), expected)
    for name, difference in zip(expected, differences, strict=True):
        found += [difference] if difference else []
        add(manifest.outputs[name].size if name in manifest.outputs else 0)
    if found:
        raise DifferenceError("\n".join(found))


def digest_of(path: Path) -> str:
    """SHA-256 of a regular file.

    Raises:
        OSError: it is none (opening a pipe would wait for a writer), or cannot be read; names it.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:  # which does not name a file that is open
        raise OSError(error.errno, error.strerror, str(path)) from None


def _difference(path: Path, expected: str) -> str:
    """What is wrong with a file; empty where nothing is."""
    try:
        digest = digest_of(path)
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return _unread(path, error)
    return "" if digest == expected else f"{path}: SHA-256 is {digest}, the manifest says {expected}"


def _others(root: Path, manifest: Manifest) -> Iterator[str]:
    """A sentence for each weight file that the manifest does not name, and each folder that may hold one."""
    unread: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=unread.append):
        place = Path(folder).relative_to(root)
        if place == Path():
            folders[:] = [name for name in folders if name != STATE]  # what ep2tp fetches and writes
        for name in sorted((*folders, *files)):
            inside = (place / name).as_posix()
            if name.endswith(".safetensors") and inside not in manifest.outputs:
                yield f"{root / inside}: is not in the manifest"
    for error in unread:
        yield _unread(Path(error.filename), error)


def _unread(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror}); see who may read it, and whether its disk is well (dmesg)"
