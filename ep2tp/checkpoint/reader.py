"""Reads which tensors a checkpoint folder holds, from safetensors headers alone. Trusts nothing that it reads.

Format: 8 bytes little-endian header length, a JSON header, the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep2tp.errors import CheckpointError
from ep2tp.model.sharding import ShardPlan

_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


def check_folder(folder: Path, plan: ShardPlan) -> None:
    """Check every MLP tensor of a folder against a plan, without reading any tensor.

    Raises:
        CheckpointError: a tensor does not fit the config, or a file or the index is invalid; the message names the
            file, the tensor and the value.
    """
    for tensor in stored_tensors(folder):
        try:
            plan.tensor(tensor.name, tensor.shape, tensor.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{tensor.file}: {error}") from None


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of a checkpoint folder, file by file.

    Raises:
        CheckpointError: the folder has no safetensors, the index names a file outside the folder or a missing one, or
            a header is invalid.
    """
    for file in checkpoint_files(folder):
        yield from read_header(file)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or all.

    Raises:
        CheckpointError: see :func:`stored_tensors`.
    """
    index = folder / _INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no .safetensors file; ep2tp reads safetensors checkpoints")
        return files
    weight_map = _json_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no object 'weight_map'; it does not say which file holds which tensor")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index}: {tensor} is said to be in {name!r}, outside of {folder}; refused")
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise CheckpointError(
            f"{index}: names {missing[0]} ({len(missing)} such files), which is missing; fetch it again"
        )
    return [folder / name for name in sorted(set(weight_map.values()))]


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is truncated, its header is not what the format says, or tensors overlap.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{file}: header of {length} bytes in a file of {size}; the file is cut off or damaged"
            )
        header = _json_object(file, stream.read(length))
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors = []
    for name, entry in header.items():
        tensors.append(_tensor(file, name, entry))
        spans.append((*entry["data_offsets"], name))
    _check_spans(file, spans, size - 8 - length)
    return tensors


def _tensor(file: Path, name: str, entry: Any) -> StoredTensor:
    is_entry = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if not is_entry or not isinstance(entry["dtype"], str):
        raise CheckpointError(f"{file}: {name}: header entry {entry!r}; expected dtype, shape and data_offsets")
    for key in ("shape", "data_offsets"):
        numbers = entry[key]
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(f"{file}: {name}: {key}={numbers!r}; expected a list of numbers from 0 up")
    if len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{file}: {name}: data_offsets={entry['data_offsets']!r}; expected a start and an end")
    return StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file)


def _check_spans(file: Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    end_before, name_before = 0, "the header"
    for start, end, name in sorted(spans):
        if start != end_before or end < start:
            raise CheckpointError(
                f"{file}: {name}: data at {start}..{end} does not follow {name_before} at {end_before}"
            )
        end_before, name_before = end, name
    if end_before != data_size:
        raise CheckpointError(
            f"{file}: {data_size} bytes of data, the header describes {end_before}; the file is cut off"
        )


def _json_object(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise CheckpointError(f"{file}: a name appears twice in its JSON; refused")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: its JSON cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}; expected an object")
    return value
