"""verify finds every kind of difference, and names where it is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from ep2tp.checkpoint.fetching import fetching_place
from ep2tp.checkpoint.reader import read_header
from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from ep2tp.errors import CheckpointError, DifferenceError
from tests.checkpoint.checkpoints import Model
from tests.checkpoint.other_user import as_nobody, open_folder

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


def test_what_ep2tp_fetches_is_no_part_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    """A reshard that was killed while it streamed leaves such a file, and one that is at work has it."""
    out = tmp_path / "out"
    reshard(source, out, tp=2)
    (out / ".ep2tp" / "fetch-0").mkdir(parents=True)
    (out / ".ep2tp" / "fetch-0" / "model.safetensors").write_bytes(b"half a file")
    assert verify(out, source).tensors
    (out / "sub" / ".ep2tp").mkdir(parents=True)
    (out / "sub" / ".ep2tp" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(DifferenceError, match=r"sub/.ep2tp/extra.safetensors: is not in the manifest"):
        verify(out)


def test_a_file_that_cannot_be_read_is_one_difference_and_the_rest_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    reshard(Model("fp8_block_f32", files=3).write(tmp_path / "source"), out, tp=2)
    first, second, third = sorted(out.glob("*.safetensors"))
    first.unlink()
    first.mkdir()
    real = hashlib.file_digest

    def digest(stream: BinaryIO, name: str) -> object:
        if stream.name == str(second):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    with third.open("ab") as file:
        file.write(b"x")
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")  # opening it would wait for a writer
    (out / "tokenizer.json").unlink()
    with pytest.raises(DifferenceError) as caught:
        verify(out)
    said = dict(line.split(": ", 1) for line in str(caught.value).splitlines())
    assert said.keys() == {str(out / name) for name in (first, second, third, "config.json", "tokenizer.json")}
    assert said[str(first)].startswith("cannot be read (not a regular file)")
    assert said[str(second)].startswith("cannot be read (Input/output error); see who may read it")
    assert said[str(third)].startswith("SHA-256 is")
    assert said[str(out / "tokenizer.json")] == "missing"


@pytest.mark.parametrize("closed", ["rank-0-of-2", "shared/model-00001-of-00001.safetensors"])
def test_what_this_user_may_not_read(closed: str) -> None:
    with open_folder() as folder:
        out = folder / "out"
        reshard(Model("fp8_block_f32", files=1).write(folder / "source"), out, tp=2, layout="ranks")
        (out / closed).chmod(0)
        with as_nobody(), pytest.raises(DifferenceError) as caught:
            verify(out)
    assert all(line.startswith(str(out / closed)) for line in str(caught.value).splitlines())
    assert "cannot be read (Permission denied)" in str(caught.value)


@pytest.mark.parametrize("named", ["output", "source"])
def test_a_read_that_fails_while_tensors_are_compared_names_its_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=2)
    [bad] = (out if named == "output" else source).glob("*.safetensors")
    real, inode = os.preadv, bad.stat().st_ino

    def preadv(file: int, *words: Any) -> int:
        if os.fstat(file).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, *words)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=rf"^{bad}: Input/output error; nothing is proven") as caught:
        verify(out, source)
    assert not isinstance(caught.value, DifferenceError)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ep2tp.json").mkdir()
    with pytest.raises(CheckpointError, match=r"ep2tp.json: cannot be read \(Is a directory\)"):
        verify(tmp_path)


def test_a_folder_that_is_a_link_to_itself(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=2, layout="ranks")
    shutil.rmtree(out / "rank-0-of-2")
    (out / "rank-0-of-2").symlink_to("rank-0-of-2")
    with pytest.raises(CheckpointError, match="is a link"):
        verify(out)


def test_where_a_file_of_the_moment_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the checkpoint; in the system's folder where that cannot be, or where the user says so."""
    monkeypatch.delenv("TMPDIR", raising=False)
    with fetching_place(tmp_path / ("o" * 255)) as place:
        assert place.parent.parent == tmp_path
        place.mkdir()
        (place / "file").write_bytes(b"x")
    assert not list(tmp_path.iterdir())
    with open_folder() as folder, as_nobody(), fetching_place(folder / "out") as place:
        assert place.parent.parent == Path(tempfile.gettempdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with open_folder() as folder, fetching_place(folder / "out") as place:
        assert place.parent.parent == tmp_path


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
