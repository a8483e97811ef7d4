"""``ep2tp verify``: proves that a converted checkpoint is what its manifest says, and equals its source.

With a source, every element is compared as bytes: the real ones with the source's, the rest with the padding that the
format prescribes (zero weights, scale 1). As each weight keeps its scale and its place in the block, equal bytes are
equal values after dequantisation, and padding dequantises to exact zeros: nothing has to be dequantised to prove it.
Headers, index, config.json and the files that are carried over are compared as well: nothing rests on the manifest.

The plan (which tensor is cut where, and with what it is filled) is computed by the code that the conversion used; how
bytes are found and compared is not shared with the code that wrote them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from ep2tp.checkpoint.compare import BLOCK, compare_tensor
from ep2tp.checkpoint.conversion import SHARED, Conversion, Job, rank_folder
from ep2tp.checkpoint.fetching import fetching_place
from ep2tp.checkpoint.hashes import check_hashes, digest_of
from ep2tp.checkpoint.manifest import Manifest, read_manifest
from ep2tp.checkpoint.options import Options, Report
from ep2tp.checkpoint.origin import InputFile, open_inputs
from ep2tp.checkpoint.prepare import open_source, prepare
from ep2tp.checkpoint.reader import INDEX, read_header
from ep2tp.checkpoint.source import Source
from ep2tp.errors import CheckpointError, DifferenceError, SettingError
from ep2tp.model.sharding import TensorPlan


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
    report: Report = lambda done, total: None,
) -> Verified:
    """Check a converted checkpoint's hashes, and with ``source`` every byte of every file.

    Args:
        folder: what :func:`reshard` wrote.
        source, revision, stream, config: the original, as for :func:`reshard`.
        workers: threads; with ``stream`` there is one, so that the disk holds one file of the source at a time.
        report: called with (bytes done, bytes to do).

    Raises:
        DifferenceError: something differs, or a file of the folder cannot be read; names every file whose hash differs.
        CheckpointError: the folder is no finished conversion, or the source cannot be read.
        SettingError: ``config`` is given without a source, or for one that has its own.
    """
    if config is not None and source is None:
        raise SettingError(f"--config {config}: is the source's; name the source with --source, too")
    root = Path(folder)
    try:
        with ExitStack() as stack:
            opened = None
            manifest = read_manifest(root)
            if source is not None:
                is_fetched = stream and not Path(source).is_dir()
                beside = stack.enter_context(fetching_place(root)) if is_fetched else root
                opened = open_source(source, beside, revision, stream, Path(config) if config else None)
            return _verify(root, manifest, opened, 1 if stream else workers or Options.workers, report)
    except OSError as error:
        raise CheckpointError(f"{error.filename or root}: {error.strerror or error}; nothing is proven") from None


def _verify(root: Path, manifest: Manifest, opened: Source | None, workers: int, report: Report) -> Verified:
    conversion = prepare(opened, manifest.ranks, manifest.layout) if opened else None
    sizes = {name: output.size for name, output in manifest.outputs.items()}
    progress = _Progress(report, sum(sizes.values()) + (conversion.source_bytes if conversion else 0))
    with ThreadPoolExecutor(workers, "ep2tp") as pool:
        check_hashes(root, manifest, pool, progress.add)
        if opened is None or conversion is None:
            return Verified(len(manifest.outputs) + len(manifest.files))
        _compare_files(root, opened, conversion, manifest)
        tensors = _compare_tensors(root, opened, conversion, manifest.inputs, pool, progress.add)
    return Verified(len(manifest.outputs) + len(manifest.files), tensors)


@dataclass
class _Progress:
    report: Report
    total: int
    done: int = 0
    lock: Lock = field(default_factory=Lock)

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            self.report(self.done, self.total)


def _compare_files(root: Path, source: Source, conversion: Conversion, manifest: Manifest) -> None:
    """Compare everything but the tensors' bytes: the other files, and the headers of the weight files."""
    made = {"config.json": conversion.config} | ({INDEX: conversion.index} if conversion.index else {})
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
    for name in conversion.others:
        with source.fetch(name) as path:
            expected[name] = digest_of(path)
    for name in sorted(expected.keys() | manifest.files.keys()):
        if expected.get(name) != manifest.files.get(name):
            raise DifferenceError(f"{root / name}: is not what the conversion of {source.label} writes")
    if changed := [name for name, digest in conversion.texts.items() if manifest.inputs.get(name) != digest]:
        raise DifferenceError(f"{source.label}/{changed[0]}: is not the file that was converted; its SHA-256 differs")
    headers = {name: header for job in conversion.jobs for name, header in job.headers.items()}
    for name in sorted(headers.keys() | manifest.outputs.keys()):
        header = headers.get(name, b"")
        if name not in manifest.outputs or not header or _start(root / name, len(header)) != header:
            raise DifferenceError(f"{root / name}: its header is not what the conversion of {source.label} writes")


def _start(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _compare_tensors(
    root: Path,
    source: Source,
    conversion: Conversion,
    inputs: Mapping[str, str],
    pool: ThreadPoolExecutor,
    add: Callable[[int], None],
) -> int:
    def compare(job: Job) -> int:
        with ExitStack() as stack:
            old = open_inputs(stack, {name: stack.enter_context(source.fetch(name)) for name in job.inputs})
            new = {name: InputFile(str(root / name), 2 * BLOCK, hashes=False) for name in job.outputs}
            for file in new.values():
                stack.callback(file.close)
            stored = {(name.rpartition("/")[0], t.name): t for name in new for t in read_header(root / name).tensors}
            by_path = {root / name: file for name, file in new.items()}
            for origin, _ in job.items:
                place = conversion.plan.tensor(origin.tensor.name, origin.tensor.shape, origin.tensor.dtype)
                slices = [stored[folder, origin.tensor.name] for folder in _folders_of(place, conversion)]
                compare_tensor(origin, old, [(tensor, by_path[tensor.file]) for tensor in slices], place)
                add(origin.tensor.size)
            for name, file in old.items():
                if file.hashes and file.digest() != inputs.get(name):
                    raise DifferenceError(f"{file.path}: is not the file that was converted; its SHA-256 differs")
        return len(job.items)

    return sum(pool.map(compare, conversion.jobs))


def _folders_of(place: TensorPlan | None, conversion: Conversion) -> Iterable[str]:
    """The folders in which a tensor of the source is found again."""
    if conversion.layout == "padded":
        return [""]
    is_routed = place is not None and place.cut is not None and place.matrix.class_name == "routed"
    ranks = conversion.plan.ranks
    return [rank_folder(rank, ranks) for rank in range(ranks)] if is_routed else [SHARED]
