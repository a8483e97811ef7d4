"""Where a checkpoint comes from: what the resharder asks of it, and the answer of a folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ep2tp.checkpoint.header import Header
from ep2tp.checkpoint.hub_cache import blob_folders, model_of
from ep2tp.checkpoint.origin import Origin
from ep2tp.checkpoint.reader import INDEX, check_names, listed_files, read_header, read_text, read_weight_map
from ep2tp.errors import CheckpointError

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl")
UNREAD = [*(f"*{suffix}" for suffix in _OTHER_WEIGHTS), "*/*.safetensors"]
"""Patterns of files that ep2tp neither reads nor carries over; the last is of other copies of a model's weights."""

FileTensors = tuple[str, Sequence[Origin], Mapping[str, str]]
"""(name of the new file, its tensors in the order of their data, its metadata)."""


class Source(Protocol):
    """A checkpoint to read."""

    @property
    def label(self) -> str:
        """What messages call it."""

    @property
    def scratch(self) -> int:
        """Bytes of the output's disk that :meth:`fetch` takes at a time."""

    def identity(self) -> dict[str, Any]:
        """What it is, for the manifest: JSON that changes when the checkpoint does."""

    def files(self) -> Sequence[FileTensors]:
        """The weight files in order. Reads headers only."""

    def others(self) -> dict[str, int]:
        """Bytes of each file that is carried over as it is, by path relative to the checkpoint."""

    def left_out(self) -> Iterable[str]:
        """Weights beside those of :meth:`files`, which no new checkpoint will have."""

    def read_text(self, name: str) -> bytes | None:
        """A small file, or None where there is none."""

    def fetch(self, name: str) -> AbstractContextManager[Path]:
        """A file on this machine, for as long as the context lasts."""


class LocalSource:
    """A checkpoint folder.

    Args:
        folder: the folder.
        config: what is read as its config.json, where it has none.

    Raises:
        CheckpointError: it is no folder.
    """

    def __init__(self, folder: Path, config: Path | None = None) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; name a checkpoint folder or a hub model (owner/name)")
        self.folder = folder.resolve()
        self.label = str(folder)
        self.scratch = 0
        self._config = config
        self._planned: dict[str, tuple[int, int, int]] = {}

    def identity(self) -> dict[str, Any]:
        """The folder, and each weight file's size and time of change; of a model in the hub's cache, its commit."""
        if model := model_of(self.folder):
            return dict(model)
        stats = {file.name: file.stat() for file in self.weight_files}
        return {
            "path": str(self.folder),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }

    def files(self) -> Sequence[FileTensors]:
        """See :meth:`Source.files`.

        Raises:
            CheckpointError: a header, the index or a link is not to be trusted.
        """
        self._planned = {file.name: _version(self.inside(file)) for file in self.weight_files}
        headers = {file.name: read_header(file) for file in self.weight_files}
        check_names(self.label, headers.values(), self.weight_map())
        return [(name, origins_of(header), header.metadata) for name, header in headers.items()]

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights.

        Raises:
            CheckpointError: there are none, the index is not to be trusted, or one that it names is missing.
        """
        return listed_files(self.folder, self.weight_map())

    def weight_map(self) -> Mapping[str, str] | None:
        """The index, where there is one."""
        text = self.read_text(INDEX)
        return None if text is None else read_weight_map(self.folder / INDEX, text)

    def others(self) -> dict[str, int]:
        """See :meth:`Source.others`: all but weights, the index, hidden files and what ep2tp writes itself."""
        return {name: self.inside(self.folder / name).stat().st_size for name in self._names() if is_carried(name)}

    def left_out(self) -> Iterable[str]:
        """See :meth:`Source.left_out`."""
        weights = {file.name for file in self.weight_files}
        return [name for name in self._names() if is_weights(name) and name not in weights]

    def _names(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(folder) / name
                if path.is_file():
                    yield path.relative_to(self.folder).as_posix()

    def read_text(self, name: str) -> bytes | None:
        """See :meth:`Source.read_text`.

        Raises:
            CheckpointError: the file is larger than any such file is, or a link out of the folder.
        """
        path = self.folder / name
        if name == "config.json" and self._config is not None:
            return read_text(self._config)
        if not path.is_file():
            return None
        return read_text(self.inside(path))

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """The file itself.

        Raises:
            CheckpointError: it is no longer the file whose header was read.
        """
        path = self.inside(self.folder / name)
        if name in self._planned and _version(path) != self._planned[name]:
            raise CheckpointError(f"{path}: was changed or replaced since its header was read; run the command again")
        yield path

    def inside(self, path: Path) -> Path:
        """``path``, unless it leads out of the folder. The hub's cache links each file to its blobs, which is fine.

        Raises:
            CheckpointError: it leads out.
        """
        real = path.resolve()
        if not any(root in real.parents for root in (self.folder, *blob_folders(self.folder))):
            raise CheckpointError(f"{path}: leads to {real}, outside of {self.folder}; refused")
        return path


def _version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def origins_of(header: Header) -> list[Origin]:
    """The tensors of one file."""
    return [Origin(tensor, (tensor,)) for tensor in header.tensors]


def is_carried(name: str) -> bool:
    """Whether a file is carried over to the new checkpoint as it is."""
    is_ours = name in ("config.json", INDEX, "ep2tp.json")
    return not (_is_hidden(name) or is_ours or is_weights(name) or name.endswith(".index.json"))


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name."""
    return PurePosixPath(name).suffix in (".safetensors", *_OTHER_WEIGHTS) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
