"""``ep2tp verify``: proves that a converted checkpoint is what its manifest says, and equals its source.

With a source, every element is compared as bytes: the real ones with the source's, the rest with the padding that the
format prescribes (zero weights, scale 1). As each weight keeps its scale and its place in the block, equal bytes are
equal values after dequantisation, and padding dequantises to exact zeros: nothing has to be dequantised to prove it.
The comparison reads the new files' own headers and shares no code with the writer but the plan's sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.compare import BLOCK, DifferenceError, compare_tensor
from ep2tp.checkpoint.conversion import Conversion, Job, rank_folder
from ep2tp.checkpoint.header import StoredTensor
from ep2tp.checkpoint.journal import MANIFEST
from ep2tp.checkpoint.origin import InputFile, open_inputs
from ep2tp.checkpoint.prepare import open_source, prepare
from ep2tp.checkpoint.reader import read_header
from ep2tp.checkpoint.source import Source
from ep2tp.errors import CheckpointError


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        files: files whose SHA-256 is right.
        tensors: tensors whose bytes equal the source's; 0 without a source.
    """

    files: int
    tensors: int = 0


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    stream: bool = False,
    config: str | Path | None = None,
    workers: int | None = None,
) -> Verified:
    """Check a converted checkpoint's hashes, and with ``source`` every byte of every tensor.

    Args:
        folder: what :func:`reshard` wrote.
        source, revision, stream, config: the original, as for :func:`reshard`.
        workers: threads.

    Raises:
        DifferenceError: something differs.
        CheckpointError: the folder is no finished conversion, or the source cannot be read.
    """
    root = Path(folder)
    manifest = _read_manifest(root)
    expected = {**{n: e["sha256"] for n, e in manifest["outputs"].items()}, **manifest["files"]}
    _check_names(root, manifest)
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), "ep2tp") as pool:
        for name, digest in zip(expected, pool.map(lambda name: _digest(root / name), expected), strict=True):
            if digest != expected[name]:
                raise DifferenceError(f"{root / name}: SHA-256 is {digest}, the manifest says {expected[name]}")
        if source is None:
            return Verified(len(expected))
        opened = open_source(source, root, revision, stream, Path(config) if config else None)
        conversion = prepare(opened, manifest["ranks"], manifest["layout"])
        tensors = _compare(root, opened, conversion, manifest["inputs"], pool)
    return Verified(len(expected), tensors)


def _read_manifest(root: Path) -> Mapping[str, Any]:
    path = root / MANIFEST
    try:
        manifest: Mapping[str, Any] = json.loads(path.read_bytes())
        names = [*manifest["outputs"], *manifest["files"]]
        is_whole = isinstance(manifest["ranks"], int) and manifest["layout"] in ("padded", "ranks")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; {root} is no finished conversion (run the same ep2tp reshard again to finish it)"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole, names = False, []
    if not is_whole or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise DifferenceError(f"{path}: damaged")
    return manifest


def _check_names(root: Path, manifest: Mapping[str, Any]) -> None:
    present = {path.relative_to(root).as_posix() for path in root.rglob("*.safetensors")}
    if extra := sorted(present - set(manifest["outputs"])):
        raise DifferenceError(f"{root / extra[0]}: is not in the manifest")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise DifferenceError(f"{path}: missing") from None


def _compare(
    root: Path, source: Source, conversion: Conversion, inputs: Mapping[str, str], pool: ThreadPoolExecutor
) -> int:
    if (root / "config.json").read_bytes() != conversion.config:
        raise DifferenceError(f"{root / 'config.json'}: is not the source's with the padded sizes")
    is_padded_layout, ranks = conversion.layout == "padded", conversion.plan.ranks
    stored: dict[tuple[str, str], StoredTensor] = {}
    for name in conversion.sizes():
        for tensor in read_header(root / name).tensors:
            if stored.setdefault((name.rpartition("/")[0], tensor.name), tensor) is not tensor:
                raise DifferenceError(f"{root / name}: {tensor.name} is stored twice")

    def compare_job(job: Job) -> int:
        with ExitStack() as stack:
            files = {name: stack.enter_context(source.fetch(name)) for name in job.inputs}
            old = open_inputs(stack, files)
            new_files = {name: InputFile(str(root / name), 2 * BLOCK, hashes=False) for name in job.headers}
            by_path = {root / name: file for name, file in new_files.items()}
            for file in new_files.values():
                stack.callback(file.close)
            for origin, _ in job.items:
                tensor = origin.tensor
                place = conversion.plan.tensor(tensor.name, tensor.shape, tensor.dtype)
                is_routed = place is not None and place.cut is not None and place.matrix.class_name == "routed"
                folders = [""] if is_padded_layout else ["shared"]
                if is_routed and not is_padded_layout:
                    folders = [rank_folder(rank, ranks) for rank in range(ranks)]
                slices = [stored.pop((folder, tensor.name), None) for folder in folders]
                if None in slices:
                    raise DifferenceError(f"{root}: {tensor.name} is missing in {folders[slices.index(None)] or root}")
                found = [(tensor, by_path[tensor.file]) for tensor in slices if tensor is not None]
                compare_tensor(origin, old, found, place)
            for name, file in old.items():
                if file.hashes and file.digest() != inputs.get(name):
                    raise DifferenceError(f"{file.path}: is not the file that was converted; its SHA-256 differs")
        return len(job.items)

    compared = sum(pool.map(compare_job, conversion.jobs))
    if stored:
        tensor = next(iter(stored.values()))
        raise DifferenceError(f"{tensor.file}: {tensor.name} is not in the source")
    return compared
