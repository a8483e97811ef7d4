"""verify finds every kind of difference, and names where it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ep2tp.checkpoint.reader import read_header
from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from ep2tp.errors import CheckpointError, DifferenceError
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
                forge(folder, path, bytes(data))
                return


def forge(folder: Path, path: Path, data: bytes) -> None:
    """Replace a file, and its hash in the manifest."""
    path.write_bytes(data)
    manifest = json.loads((folder / "ep2tp.json").read_text())
    name, digest = path.relative_to(folder).as_posix(), hashlib.sha256(data).hexdigest()
    if path.suffix == ".safetensors":
        manifest["outputs"][name] = {"size": len(data), "sha256": digest}
    else:
        manifest["files"][name] = digest
    (folder / "ep2tp.json").write_text(json.dumps(manifest))


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


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json", "modeling_new.py"])
def test_other_files_are_compared_with_the_source(tmp_path: Path, name: str) -> None:
    source = Model("fp8_block_f32").write(tmp_path / "source")
    reshard(source, tmp_path / "out", tp=2)
    forge(tmp_path / "out", tmp_path / "out" / name, b"{}")
    verify(tmp_path / "out")
    with pytest.raises(DifferenceError, match=name):
        verify(tmp_path / "out", source)


def test_headers_are_compared_with_the_plan(source: Path, tmp_path: Path) -> None:
    """In a rank file's header stands which axis its slices lie on, and the loader obeys it."""
    out = tmp_path / "out"
    reshard(source, out, tp=2, layout="ranks")
    path = next(out.glob("rank-0-of-2/*.safetensors"))
    data = path.read_bytes()
    assert b":[1,1]" in data
    forge(out, path, data.replace(b":[1,1]", b":[0,1]", 1))
    verify(out)
    with pytest.raises(DifferenceError, match="header"):
        verify(out, source)


@pytest.mark.parametrize("wrong", ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"])
def test_inputs_are_the_ones_that_were_converted(source: Path, tmp_path: Path, wrong: str) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=2)
    manifest = json.loads((out / "ep2tp.json").read_text())
    weights = {path.name for path in source.glob("*.safetensors")}
    assert set(manifest["inputs"]) == weights | {"config.json", "model.safetensors.index.json"}
    manifest["inputs"][wrong] = "0" * 64
    (out / "ep2tp.json").write_text(json.dumps(manifest))
    with pytest.raises(DifferenceError, match="is not the file that was converted"):
        verify(out, source)


def test_a_link_in_place_of_a_file(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2)
    path = next((tmp_path / "out").glob("*.safetensors"))
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(CheckpointError, match="is a link"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks"),
        ({"layout": "rows"}, "layout"),
        ({"outputs": []}, "outputs"),
        ({"outputs": {"model.safetensors": {"size": 10}}}, "sha256"),
        ({"inputs": []}, "inputs"),
        ({"files": {"config.json": "abc"}}, "config.json"),
        ({"files": {"../source/config.json": "0" * 64}}, "outside of"),
        ({"files": {"/etc/passwd": "0" * 64}}, "outside of"),
    ],
)
def test_damaged_manifest(source: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    reshard(source, tmp_path / "out", tp=2)
    manifest = json.loads((tmp_path / "out" / "ep2tp.json").read_text()) | change
    (tmp_path / "out" / "ep2tp.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "out")


def test_progress(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2)
    seen: list[tuple[int, int]] = []
    verify(tmp_path / "out", source, report=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert 0.9 * seen[-1][1] < seen[-1][0] <= seen[-1][1]
