"""What reshard does with an output folder that is not new, or that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ep2tp.checkpoint import destination, journal, writer
from ep2tp.checkpoint.journal import Journal
from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from ep2tp.errors import CheckpointError, SettingError
from tests.checkpoint.checkpoints import Model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Model("fp8_block_f32").write(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("layout", ["padded", "ranks"])
def test_overwrite_leaves_other_files(source: Path, tmp_path: Path, layout: Any) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=4, layout="ranks")
    (out / "rank-0-of-4" / "notes.txt").write_text("mine")
    (out / "lora").mkdir()
    (out / "lora" / "adapter.bin").write_text("mine")
    reshard(source, out, tp=2, layout=layout, overwrite=True)
    left = names(out)
    reshard(source, tmp_path / "new", tp=2, layout=layout)
    assert left - names(tmp_path / "new") == {"rank-0-of-4", "rank-0-of-4/notes.txt", "lora", "lora/adapter.bin"}
    verify(out, source)
    assert reshard(source, out, tp=2, layout=layout).status == "complete"


def test_overwrite_does_not_replace_other_files(source: Path, tmp_path: Path) -> None:
    other = Model("fp8_block_f32", seed=1).write(tmp_path / "other")
    (other / "README.md").write_text("theirs")
    reshard(source, tmp_path / "out", tp=2)
    (tmp_path / "out" / "README.md").write_text("mine")
    before = names(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"README\.md: is not ep2tp's"):
        reshard(other, tmp_path / "out", tp=2, overwrite=True)
    assert names(tmp_path / "out") == before


def test_overwrite_never_leaves_the_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=2)
    (tmp_path / "thesis.txt").write_text("all my work")
    manifest = json.loads((out / "ep2tp.json").read_text())
    manifest["files"]["../thesis.txt"] = "0"
    (out / "ep2tp.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside of"):
        reshard(source, out, tp=4, overwrite=True)
    assert (tmp_path / "thesis.txt").is_file() and (out / "config.json").is_file()


def test_interrupted_overwrite(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    reshard(source, out, tp=4, layout="ranks")
    (out / "thesis.txt").write_text("all my work")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the earlier files are removed
        patch.setattr(journal, "write_file", stop)
        reshard(source, out, tp=2, overwrite=True)
    with pytest.raises(CheckpointError, match="--overwrite"):
        reshard(source, out, tp=2)
    with pytest.raises(KeyboardInterrupt):  # the folder is the new conversion's
        reshard(source, out, tp=2, overwrite=True, report=stop)
    assert not (out / "ep2tp.json").exists()
    assert reshard(source, out, tp=2).status == "done"
    verify(out, source)
    assert (out / "thesis.txt").is_file()


@pytest.mark.parametrize("options", [{"ranks": [1]}, {"finish": True}])
def test_overwrite_spares_other_machines_ranks(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    reshard(source, tmp_path / "out", tp=2, layout="ranks", ranks=[0])
    before = names(tmp_path / "out")
    with pytest.raises(SettingError, match="other machines"):
        reshard(source, tmp_path / "out", tp=2, layout="ranks", overwrite=True, **options)
    assert names(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_finished_but_damaged(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=2)
    for damage in (lambda: (out / name).unlink(), lambda: os.truncate(out / name, 1)):
        damage()
        with pytest.raises(CheckpointError, match=rf"{name}.*--overwrite"):
            reshard(source, out, tp=2)
        assert reshard(source, out, tp=2, overwrite=True).status == "done"
    verify(out, source)


def test_no_room_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = destination.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(destination.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        for dry_run in (False, True):
            with pytest.raises(CheckpointError, match=r"nothing was written\. Make room"):
                reshard(source, tmp_path / "out", tp=2, dry_run=dry_run)
    assert not list(tmp_path.iterdir())


def test_space_counts_carried_files_and_what_is_removed(source: Path, tmp_path: Path) -> None:
    other = Model("fp8_block_f32").write(tmp_path / "other")
    with (other / "data.dat").open("wb") as file:
        file.truncate(50 << 20)
    plain, carried = (reshard(s, tmp_path / "out", tp=2, dry_run=True) for s in (source, other))
    assert carried.needed == plain.needed + (50 << 20)
    assert plain.needed > sum(plain.conversion.sizes().values()) and plain.free > plain.needed
    reshard(source, tmp_path / "out", tp=2)
    assert reshard(source, tmp_path / "out", tp=2, dry_run=True).status == "complete"
    assert reshard(other, tmp_path / "out", tp=2, dry_run=True, overwrite=True).needed == 50 << 20


def test_dry_run_checks_the_destination(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all my work")
    for out in (source / "out", tmp_path / "full", tmp_path / "full" / "thesis.txt" / "out"):
        with pytest.raises(CheckpointError, match=r"must not lie in|did not write|is not a folder"):
            reshard(source, out, tp=2, dry_run=True)


def test_read_only_disk(source: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for dry_run in (False, True):
        with pytest.raises(CheckpointError, match="cannot be written to"):
            reshard(source, disk / "out", tp=2, dry_run=dry_run)


def test_full_disk(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really full, where the space check was right when it was made; then it goes on with more room."""
    source = Model("fp8_block_f32", files=12).write(tmp_path / "source")
    reshard(source, tmp_path / "whole", tp=2)
    monkeypatch.setattr(destination, "_MARGIN", -(1 << 40))
    with pytest.raises(CheckpointError, match=r"No space left on device"):
        reshard(source, disk / "out", tp=2, workers=1)
    kept = len(list((disk / "out").glob("*.safetensors")))
    assert 0 < kept < 12
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert reshard(source, disk / "out", tp=2).resumed == kept
    assert names(disk / "out") == names(tmp_path / "whole")
    verify(disk / "out", source)


def test_long_names(tmp_path: Path) -> None:
    source = Model("bf16", files=1).write(tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()
    long, longest = (source / ("x" * count + ".safetensors") for count in (228, 243))
    next(source.glob("*.safetensors")).rename(long)
    assert reshard(source, tmp_path / "long", tp=7, layout="ranks").status == "done"
    long.rename(longest)
    with pytest.raises(CheckpointError, match="too long"):
        reshard(source, tmp_path / "out", tp=7, layout="ranks")
    assert not (tmp_path / "out").exists()
    assert reshard(source, tmp_path / "longest", tp=7).status == "done"


def test_new_folders_are_durable(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = writer.sync_folder, set()

    def sync_folder(folder: Path) -> None:
        synced.add(folder)
        real(folder)

    monkeypatch.setattr(writer, "sync_folder", sync_folder)
    out = tmp_path / "a" / "out"
    reshard(source, out, tp=2, layout="ranks")
    folders = {path for path in (tmp_path / "a").rglob("*") if path.is_dir()}
    assert {tmp_path, tmp_path / "a"} | folders <= synced


def test_errors_of_the_disk_are_errors_of_ep2tp(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(self: Journal, parts: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "place")

    monkeypatch.setattr(Journal, "lock", lock)
    with pytest.raises(CheckpointError, match="place: Input/output error"):
        reshard(source, tmp_path / "out", tp=2)
