"""Reads what ``ep2tp reshard --layout ranks`` wrote, for the loaders of the engines. Needs torch, knows no engine.

Engines' expert loaders take whole tensors and copy rank r's slice out of them. The rank files hold slices. So each
slice is read into memory where it lies at rank r's place of a view as large as the whole tensor: for columns the view's
rows overlap, for rows the memory around the slice is reserved but never touched. The rest of the view means nothing,
and no engine keeps it: every expert loader that slices by rank, fused or not, copies exactly the slice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from ep2tp.checkpoint.conversion import CUTS, SHARED, rank_folder
from ep2tp.checkpoint.header import StoredTensor
from ep2tp.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from ep2tp.checkpoint.reader import read_header
from ep2tp.errors import CheckpointError

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class RankFiles:
    """One conversion for rank files.

    Attributes:
        folder: where it lies.
        ranks: slices of every expert.
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest.

        Raises:
            CheckpointError: the folder is no finished conversion for rank files.
        """
        self.folder, self.bytes_read = folder, 0
        self._manifest = _finished(folder)
        self.ranks = self._manifest.ranks

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Whether a folder holds a conversion for rank files, finished or not."""
        try:
            return bool(json.loads((folder / MANIFEST).read_bytes())["layout"] == "ranks")
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def weights(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the shared tensors, then this rank's slices as whole-sized views.

        Raises:
            CheckpointError: a file that the manifest names is missing, or was cut off.
        """
        for folder, place, ranks in ((SHARED, 0, 1), (rank_folder(rank, self.ranks), rank, self.ranks)):
            for name, output in sorted(self._manifest.outputs.items()):
                if name.startswith(f"{folder}/"):
                    yield from self._read(_whole(self.folder / name, output.size), place, ranks)

    def _read(self, path: Path, rank: int, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
        header = read_header(path)
        cuts = json.loads(header.metadata.get(CUTS, "{}"))
        with path.open("rb", buffering=0) as file:
            for tensor in header.tensors:
                axis, parts = cuts.get(tensor.name, (0, 1))
                self.bytes_read += tensor.size
                yield tensor.name, read_slice(file.fileno(), tensor, axis, parts, rank, ranks)


def read_slice(file: int, tensor: StoredTensor, axis: int, parts: int, rank: int, ranks: int) -> torch.Tensor:
    """Read one rank's slice as a view of the whole tensor's size, in which only that slice means anything.

    Args:
        file: descriptor of the open file.
        tensor: the slice as stored.
        axis: the sliced axis.
        parts: matrices that lie one after the other on the axis (2 for gate and up as halves).
        rank, ranks: whose slice it is.
    """
    dtype = _DTYPES[tensor.dtype]
    outer, inner = prod(tensor.shape[:axis]), prod(tensor.shape[axis + 1 :])
    width = tensor.shape[axis] // parts if tensor.shape else 1
    shape = (*tensor.shape[:axis], ranks * parts * width, *tensor.shape[axis + 1 :]) if tensor.shape else ()
    if parts == 1 or ranks == 1:
        width *= parts
        # Element (o, j, i) of the whole lies at (o*width + j)*inner + i: rank r's slice is then contiguous from
        # r*width*inner on.
        lead = rank * width * inner
        memory = torch.empty(outer * width * inner + (ranks - 1) * width * inner, dtype=dtype)
        _read_into(file, tensor, memory[lead : lead + outer * width * inner])
        return memory.as_strided(shape, _strides(tensor.shape))
    slices = torch.empty(outer, parts, width, inner, dtype=dtype)
    _read_into(file, tensor, slices)
    whole = torch.empty(outer, parts, ranks * width, inner, dtype=dtype)
    whole.narrow(2, rank * width, width).copy_(slices)
    return whole.view(shape)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _read_into(file: int, tensor: StoredTensor, memory: torch.Tensor) -> None:
    view = memoryview(memory.view(-1).view(torch.uint8).numpy())
    done = 0
    while done < tensor.size:
        count = os.preadv(file, [view[done:]], tensor.offset + done)
        if count == 0:
            raise CheckpointError(f"{tensor.file}: {tensor.name}: the file ends within its data; it was cut off")
        done += count


def _whole(path: Path, size: int) -> Path:
    """A file, once it is known to be there with as many bytes as the manifest says.

    Raises:
        CheckpointError: it is not.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise CheckpointError(
            f"{path}: {'missing' if found is None else f'{found} bytes'}, {MANIFEST} says {size} bytes; copy the "
            "checkpoint again, or run ep2tp verify on it"
        )
    return path


def _finished(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.layout != "ranks":
        raise CheckpointError(
            f"{folder / MANIFEST}: layout {manifest.layout!r}, which any engine reads as it is; leave out the load "
            "format of ep2tp"
        )
    return manifest
