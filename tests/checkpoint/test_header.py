"""The header reader, attacked: it refuses with ep2tp's own error, or returns what is consistent."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep2tp.checkpoint.header import build_header
from ep2tp.checkpoint.reader import checkpoint_files, read_header, read_weight_map
from ep2tp.checkpoint.source import LocalSource
from ep2tp.errors import CheckpointError


def file_of(header: Any, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(start: int = 0, stop: int = 8, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


DAMAGED = {
    "empty": b"",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2**63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "lone surrogate": file_of(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}"),
    "not an object": file_of([1]),
    "deep": file_of(b"[" * 100_000),
    "a name twice": file_of(b'{"a": 1, "a": 1}'),
    "overlap": file_of({"a": entry(), "b": entry(4, 12)}, 12),
    "gap": file_of({"a": entry(), "b": entry(12, 20)}, 20),
    "backwards": file_of({"a": entry(8, 0)}),
    "negative": file_of({"a": entry(-8, 0)}),
    "huge": file_of({"a": entry(0, 1 << 70)}),
    "huge shape": file_of({"a": entry(shape=(1 << 40, 1 << 40))}),
    "shape and bytes differ": file_of({"a": entry(shape=(3,))}),
    "true is no size": file_of({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, 1),
    "unknown dtype": file_of({"a": entry(dtype="Q4")}),
    "data cut off": file_of({"a": entry()}, 7),
    "data too long": file_of({"a": entry()}, 9),
    "extra key": file_of({"a": entry() | {"code": 1}}),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}, 0),
    "NaN": file_of(b'{"a": NaN}'),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_headers_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "a\0.safetensors"])
def test_index_entries_that_leave_the_folder(name: Any) -> None:
    with pytest.raises(CheckpointError, match="refused"):
        read_weight_map(Path("model.safetensors.index.json"), json.dumps({"weight_map": {"a": name}}).encode())


def test_an_index_too_large_to_be_one(tmp_path: Path) -> None:
    """A sparse file of 1.5 GB: not read at all, by the resharder and by launches."""
    (tmp_path / "model.safetensors").write_bytes(file_of({"a": entry()}))
    index = tmp_path / "model.safetensors.index.json"
    index.touch()
    os.truncate(index, 3 << 29)
    for read in (checkpoint_files, lambda folder: LocalSource(folder).files()):
        with pytest.raises(CheckpointError, match="larger than 100000000 bytes"):
            read(tmp_path)


def test_an_index_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(file_of({"a": entry()}))
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    (folder / "model.safetensors.index.json").symlink_to(tmp_path / "index.json")
    for read in (LocalSource.files, LocalSource.identity):
        with pytest.raises(CheckpointError, match="outside of"):
            read(LocalSource(folder))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_weights_that_are_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_of({"a": entry()}))
    make(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: is no regular file"):
        checkpoint_files(tmp_path)


VALID = file_of({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(8, 10, (2, 1), "U8")}, 10)


@settings(max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=60).map(file_of),
        st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
        st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)).map(
            lambda value: file_of({"a": value})
        ),
    )
)
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes | list[tuple[int, int]]) -> None:
    if isinstance(data, list):
        changed = bytearray(VALID)
        for position, value in data:
            changed[position] = value
        data = bytes(changed)
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert header.start + sum(tensor.size for tensor in header.tensors) == len(data)


def test_built_headers_read_back(tmp_path: Path) -> None:
    start = build_header({"format": "pt"}, [("a", "F32", (2,), 8), ("ü", "U8", (), 1)])
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + bytes(9))
    header = read_header(path)
    assert len(start) % 8 == 0 and header.metadata == {"format": "pt"}
    assert [(t.name, t.offset - len(start)) for t in header.tensors] == [("a", 0), ("ü", 8)]
