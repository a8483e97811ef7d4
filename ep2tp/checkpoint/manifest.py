"""``ep2tp.json``: what a converted checkpoint was made from, how, and the SHA-256 of every file. Written and read."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ep2tp import __version__
from ep2tp.checkpoint.header import parse_json
from ep2tp.errors import CheckpointError

if TYPE_CHECKING:
    from ep2tp.checkpoint.conversion import Conversion

MANIFEST = "ep2tp.json"
FORMAT = 1

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Output(BaseModel):
    """One weight file: its bytes and SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=8)]
    sha256: _Digest


class Manifest(BaseModel):
    """A finished conversion.

    Attributes:
        layout: ``padded`` or ``ranks``.
        ranks: the tensor-parallel size that it was written for.
        inputs: SHA-256 of the source's files.
        outputs: each weight file.
        files: SHA-256 of each other file, config.json and the index included.
        fingerprint: see :meth:`Conversion.fingerprint`.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1]
    layout: Literal["padded", "ranks"]
    ranks: Annotated[int, Field(ge=1)]
    inputs: dict[str, _Digest]
    outputs: dict[str, Output]
    files: dict[str, _Digest]
    fingerprint: str


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished conversion.

    Raises:
        CheckpointError: there is none, it cannot be read or is damaged, or it names a file outside of the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate(parse_json(path, path.read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; {folder} is no finished conversion (run the same ep2tp reshard again to finish it)"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); see who may read it, and the disk") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: damaged: {where}: {first['msg']}; convert again with --overwrite") from None
    for name in (*manifest.outputs, *manifest.files):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"{path}: names {name!r}, outside of {folder}; refused")
        _check_place(folder, folder / name)
    return manifest


def _check_place(folder: Path, place: Path) -> None:
    """Check that no link leads to a file elsewhere. What cannot be looked at is told when it is read."""
    try:
        is_elsewhere = place.is_symlink() or folder.resolve() not in place.resolve().parents
    except RuntimeError:  # links that lead to one another
        is_elsewhere = True
    except OSError:
        return
    if is_elsewhere:
        raise CheckpointError(f"{place}: is a link; ep2tp writes none, so it is not the file that was written")


def build_manifest(
    conversion: Conversion, fingerprint: str, notes: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]
) -> bytes:
    """The manifest's bytes: the same for the same conversion, as they hold no time and no host.

    Args:
        conversion: what was done.
        fingerprint: see :meth:`Conversion.fingerprint`.
        notes: for each output file its size, SHA-256 and inputs, as in the journal.
        files: SHA-256 of each other file, config.json and the index included.
    """
    plan = conversion.plan
    inputs: dict[str, str] = dict(conversion.texts)
    for note in notes.values():
        inputs |= note["inputs"]
    manifest = {
        "format": FORMAT,
        "versions": {"ep2tp": __version__, "numpy": version("numpy"), "python": platform.python_version()},
        "source": dict(conversion.identity),
        "layout": conversion.layout,
        "ranks": plan.ranks,
        "patch": plan.facts.family.name,
        "fields": {field: list(values) for field, values in plan.fields.items()},
        "classes": {
            name: {"size": split.size, "padded": split.padded, "per_rank": split.per_rank}
            for name, split in plan.splits.items()
        },
        "inputs": dict(sorted(inputs.items())),
        "outputs": {name: {"size": note["size"], "sha256": note["sha256"]} for name, note in sorted(notes.items())},
        "files": dict(sorted(files.items())),
        "fingerprint": fingerprint,
    }
    return (json.dumps(manifest, indent=1) + "\n").encode()
