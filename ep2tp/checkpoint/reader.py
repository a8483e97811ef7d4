"""Reads which tensors a checkpoint folder holds, from safetensors headers alone. Trusts nothing that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.header import Header, StoredTensor, header_length, parse_header, parse_json
from ep2tp.errors import CheckpointError
from ep2tp.model.sharding import ShardPlan

INDEX = "model.safetensors.index.json"


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
        yield from read_header(file).tensors


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or all.

    Raises:
        CheckpointError: see :func:`stored_tensors`.
    """
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no .safetensors file; ep2tp reads safetensors checkpoints")
        return files
    names = set(read_weight_map(index, index.read_bytes()).values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{index}: names {missing[0]} ({len(missing)} such files), which is missing; fetch it again"
        )
    return [folder / name for name in sorted(names)]


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
