"""The header of a safetensors file: parsed without trust, and written.

Format: 8 bytes little-endian header length, a JSON header, the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ep2tp.errors import CheckpointError
from ep2tp.model.dtypes import BITS

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a header describes it.

    Attributes:
        file: the file that holds it.
        offset: its first byte, counted from the start of the file.
        size: its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        tensors: in the order of their data.
        metadata: the file's ``__metadata__``.
        start: where the data begins, in bytes from the start of the file.
        size: bytes of the whole file.
    """

    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    start: int
    size: int


def header_length(file: Path, first: bytes, size: int) -> int:
    """Bytes of the JSON header, from the first 8 bytes of a file of ``size`` bytes.

    Raises:
        CheckpointError: the file is too short for the header that it announces.
    """
    length = int(struct.unpack("<Q", first)[0]) if len(first) == 8 else size
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(f"{file}: header of {length} bytes in a file of {size}; the file is cut off or damaged")
    return length


def parse_header(file: Path, text: bytes, size: int) -> Header:
    """Parse a JSON header.

    Args:
        file: the file's name, for messages and for :attr:`StoredTensor.file`.
        text: the JSON, without the length before it.
        size: bytes of the whole file.

    Raises:
        CheckpointError: the header is not what the format says, does not fit the file, or its tensors overlap.
    """
    entries = parse_json(file, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is not an object of strings; the file is damaged")
    start = 8 + len(text)
    tensors = [_tensor(file, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    _check_spans(file, tensors, start, size)
    return Header(tuple(tensors), metadata, start, size)


def build_header(metadata: dict[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The start of a safetensors file, length included, for tensors (name, dtype, shape, bytes) in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def parse_json(file: Path, text: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no name appears twice.

    Raises:
        CheckpointError: it is not one.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise CheckpointError(f"{file}: a name appears twice in its JSON; refused")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates have no bytes to be written as
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: its JSON cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}; expected an object")
    return value


def _tensor(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    is_entry = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if not is_entry or not isinstance(entry["dtype"], str):
        raise CheckpointError(f"{file}: {name}: header entry {entry!r}; expected dtype, shape and data_offsets")
    for key in ("shape", "data_offsets"):
        numbers = entry[key]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise CheckpointError(f"{file}: {name}: {key}={numbers!r}; expected a list of numbers from 0 up")
    if len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{file}: {name}: data_offsets={entry['data_offsets']!r}; expected a start and an end")
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, start + begin, end - begin)
    if tensor.dtype not in BITS:
        raise CheckpointError(f"{file}: {name}: dtype {tensor.dtype!r} is none of safetensors ({', '.join(BITS)})")
    if tensor.size * 8 != prod(tensor.shape) * BITS[tensor.dtype]:
        raise CheckpointError(
            f"{file}: {name}: {tensor.size} bytes of data for shape {list(tensor.shape)} of {tensor.dtype}; the header "
            "contradicts itself"
        )
    return tensor


def _check_spans(file: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    end_before, name_before = start, "the header"
    for tensor in tensors:
        if tensor.offset != end_before:
            raise CheckpointError(
                f"{file}: {tensor.name}: data at {tensor.offset - start}..{tensor.offset + tensor.size - start} does "
                f"not follow {name_before} at {end_before - start}"
            )
        end_before, name_before = tensor.offset + tensor.size, tensor.name
    if end_before != size:
        raise CheckpointError(
            f"{file}: {size - start} bytes of data, the header describes {end_before - start}; the file is cut off"
        )
