"""Reads which tensors a checkpoint folder holds, from safetensors headers alone. Trusts nothing that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.header import Header, StoredTensor, header_length, parse_header, parse_json
from ep2tp.errors import CheckpointError
from ep2tp.model.families import ClassName
from ep2tp.model.sharding import ShardPlan

INDEX = "model.safetensors.index.json"
MAX_TEXT = 100_000_000
"""Bytes that ep2tp reads of a JSON file."""


def check_folder(folder: Path, plan: ShardPlan) -> None:
    """Check every MLP tensor of a folder against a plan, without reading any tensor.

    Raises:
        CheckpointError: a tensor does not fit the config, a file or the index is invalid (the message names the file,
            the tensor and the value), or no tensor has a name that the plan pads.
    """
    found: set[ClassName] = set()
    for tensor in stored_tensors(folder):
        try:
            place = plan.tensor(tensor.name, tensor.shape, tensor.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{tensor.file}: {error}") from None
        if place is not None:
            found.add(place.matrix.class_name)
    plan.check_found(found)


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of a checkpoint folder, file by file.

    Raises:
        CheckpointError: the folder has no safetensors, the index names a file outside the folder or a missing one, or
            a header is invalid.
    """
    for file in checkpoint_files(folder):
        yield from read_header(file).tensors


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or all.

    Raises:
        CheckpointError: see :func:`stored_tensors`.
    """
    index = folder / INDEX
    return listed_files(folder, read_weight_map(index, read_text(index)) if index.is_file() else None)


def listed_files(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    """Like :func:`checkpoint_files`, with the index already read; None where there is none."""
    if weight_map is None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no .safetensors file; ep2tp reads safetensors checkpoints")
        if odd := [file for file in files if not file.is_file()]:
            raise CheckpointError(f"{odd[0]}: is no regular file, though named as one with weights; remove it")
        return files
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder / INDEX}: names {missing[0]} ({len(missing)} such files), which is missing; fetch it again"
        )
    return [folder / name for name in names]


def read_text(path: Path) -> bytes:
    """A JSON file.

    Raises:
        CheckpointError: it is larger than any such file is.
    """
    if path.stat().st_size > MAX_TEXT:
        raise CheckpointError(f"{path}: larger than {MAX_TEXT} bytes; refused")
    return path.read_bytes()


def read_weight_map(index: Path, text: bytes) -> dict[str, str]:
    """Which file an index says holds each tensor.

    Raises:
        CheckpointError: it is no index, or it names a file outside of its folder.
    """
    weight_map: Any = parse_json(index, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no object 'weight_map'; it does not say which file holds which tensor")
    checked: set[str] = set()
    for tensor, name in weight_map.items():
        if isinstance(name, str) and name in checked:
            continue
        is_plain = (
            isinstance(name, str) and name and Path(name).name == name and name not in (".", "..") and "\0" not in name
        )
        if not is_plain:
            raise CheckpointError(f"{index}: {tensor} is said to be in {name!r}, outside of {index.parent}; refused")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {tensor} is said to be in {name!r}; ep2tp reads .safetensors files only")
        checked.add(name)
    return weight_map


def read_header(file: Path) -> Header:
    """The header of one safetensors file.

    Raises:
        CheckpointError: the file is truncated, its header is not what the format says, or tensors overlap.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = header_length(file, stream.read(8), size)
        return parse_header(file, stream.read(length), size)


def check_names(label: str, headers: Iterable[Header], weight_map: Mapping[str, str] | None) -> None:
    """Check that no tensor is stored twice, and that the index and the headers agree.

    Raises:
        CheckpointError: they do not; the message names the tensor and its files.
    """
    found: dict[str, str] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in found:
                raise CheckpointError(
                    f"{label}: {tensor.name} is in {found[tensor.name]} and in {tensor.file.name}; refused, as nothing "
                    "says which of them counts"
                )
            found[tensor.name] = tensor.file.name
    for name, file in (weight_map or {}).items():
        if found.get(name) != file:
            raise CheckpointError(
                f"{label}/{INDEX}: {name} is said to be in {file}; it is in {found.get(name, 'no file')}. "
                "Fetch the checkpoint again"
            )
