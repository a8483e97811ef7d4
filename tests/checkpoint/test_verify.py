"""verify finds every kind of difference, and names where it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ep2tp.checkpoint.compare import DifferenceError
from ep2tp.checkpoint.reader import read_header
from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from ep2tp.errors import CheckpointError
from tests.checkpoint.checkpoints import Model

NAME = "model.layers.1.mlp.experts.1.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Model("fp8_block_f32", files=1).write(tmp_path / "source")


def flip(folder: Path, tensor: str, byte: int) -> None:
    """Change one byte of a tensor, and the manifest with it."""
    for path in sorted(folder.rglob("*.safetensors")):
        for found in read_header(path).tensors:
            if found.name == tensor:
                data = bytearray(path.read_bytes())
                data[found.offset + byte] ^= 1
                path.write_bytes(data)
                manifest = json.loads((folder / "ep2tp.json").read_text())
                name = str(path.relative_to(folder))
                manifest["outputs"][name]["sha256"] = hashlib.sha256(data).hexdigest()
                (folder / "ep2tp.json").write_text(json.dumps(manifest))
                return


@pytest.mark.parametrize("layout", ["padded", "ranks"])
@pytest.mark.parametrize("byte", [0, 127])
def test_one_changed_bit(source: Path, tmp_path: Path, layout: str, byte: int) -> None:
    reshard(source, tmp_path / "out", tp=2, layout=layout)  # type: ignore[arg-type]
    flip(tmp_path / "out", NAME, byte)
    verify(tmp_path / "out")  # the manifest was changed with it
    with pytest.raises(DifferenceError, match=r"experts\.1\.down_proj\.weight: differs"):
        verify(tmp_path / "out", source)


def test_padding_that_is_not_zero(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2)
    flip(tmp_path / "out", NAME, 255)  # the last column of the first row
    with pytest.raises(DifferenceError, match=r"down_proj\.weight: padding"):
        verify(tmp_path / "out", source)


def _remove(out: Path) -> None:
    next(out.glob("*.safetensors")).unlink()


def _append(out: Path) -> None:
    with next(out.glob("*.safetensors")).open("ab") as file:
        file.write(b"x")


def _add(out: Path) -> None:
    (out / "extra.safetensors").write_bytes(b"")


def _config(out: Path) -> None:
    (out / "config.json").write_text("{}")


@pytest.mark.parametrize("damage", [_remove, _append, _add, _config])
def test_changed_files(source: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    reshard(source, tmp_path / "out", tp=2)
    damage(tmp_path / "out")
    with pytest.raises(DifferenceError):
        verify(tmp_path / "out")


def test_another_source(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2)
    other = Model("fp8_block_f32", files=1, seed=1).write(tmp_path / "other")
    with pytest.raises(DifferenceError, match="differs from the source"):
        verify(tmp_path / "out", other)


def test_unfinished(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2, layout="ranks", ranks=[1])
    with pytest.raises(CheckpointError, match="no finished conversion"):
        verify(tmp_path / "out")


def test_manifest_that_leaves_the_folder(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2)
    manifest = json.loads((tmp_path / "out" / "ep2tp.json").read_text())
    manifest["files"]["../source/config.json"] = ""
    (tmp_path / "out" / "ep2tp.json").write_text(json.dumps(manifest))
    with pytest.raises(DifferenceError, match="damaged"):
        verify(tmp_path / "out")
