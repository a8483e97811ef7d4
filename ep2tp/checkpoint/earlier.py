"""What is in an output folder before a conversion begins: nothing, its own beginnings, another one, or other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.manifest import MANIFEST
from ep2tp.errors import CheckpointError, OtherConversionError

STATE = ".ep2tp"
LOCK = ".ep2tp.lock"
PLAN = f"{STATE}/plan.json"


def check_free(folder: Path, fingerprint: str, files: Collection[str], replace: bool) -> None:
    """Check that a folder is empty, or holds this very conversion.

    Args:
        folder: the output folder; it need not exist.
        fingerprint: what the conversion is.
        files: what it writes.
        replace: the folder may hold another conversion; what that did not write must not be in the way.

    Raises:
        OtherConversionError: it holds another conversion.
        CheckpointError: it holds something else.
    """
    if not folder.exists():
        return
    noted = load(folder / MANIFEST) or load(folder / PLAN)
    if noted is None and any(path.name not in (STATE, LOCK) for path in folder.iterdir()):
        raise CheckpointError(f"{folder}: holds files that ep2tp did not write; name an empty or a new folder")
    if replace:
        written = set(earlier_files(folder))
        paths = [folder / name for name in sorted(files)]
        if foreign := [path for path in paths if path.exists() and path not in written]:
            raise CheckpointError(f"{foreign[0]}: is not ep2tp's, and would be replaced; move it away")
    elif noted is not None and noted.get("fingerprint") != fingerprint:
        raise OtherConversionError(
            f"{folder}: holds another conversion (other source, layout or --tp); name another folder, or replace it "
            "with --overwrite"
        )


def earlier_files(folder: Path) -> list[Path]:
    """The files in a folder that an earlier conversion wrote, finished or not; without its manifest and state.

    Raises:
        CheckpointError: the manifest or the plan is damaged, or names a file outside of the folder.
    """
    names: set[str] = set()
    for path, keys in ((folder / MANIFEST, ("outputs", "files")), (folder / PLAN, ("files",))):
        noted = load(path) or {}
        for key in keys:
            if not isinstance(found := noted.get(key, []), dict | list):
                raise CheckpointError(f"{path}: damaged; name another folder")
            names.update(map(str, found))
    paths = [path for path in (folder / name for name in sorted(names)) if path.is_file()]
    root = folder.resolve()
    if outside := [path for path in paths if not path.parent.resolve().is_relative_to(root)]:
        raise CheckpointError(f"{outside[0]}: is outside of {root}; ep2tp does not remove it")
    return paths


def remove_earlier(folder: Path) -> None:
    """Remove what :func:`earlier_files` finds, folders that are empty then, and the notes; nothing of anybody else."""
    for path in earlier_files(folder):
        path.unlink()
        with suppress(OSError):  # not empty
            for parent in path.relative_to(folder).parents[:-1]:
                (folder / parent).rmdir()
    shutil.rmtree(folder / STATE / "done", ignore_errors=True)


def load(path: Path) -> dict[str, Any] | None:
    """A JSON object that ep2tp wrote, or None where there is none.

    Raises:
        CheckpointError: it is no such object.
    """
    if not path.is_file():
        return None
    try:
        noted = json.loads(path.read_bytes())
    except ValueError:
        noted = None
    if not isinstance(noted, dict):
        raise CheckpointError(f"{path}: damaged; name another folder")
    return noted
