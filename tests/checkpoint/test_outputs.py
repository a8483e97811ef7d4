"""What the new checkpoint cannot hold is refused or reported before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ep2tp.checkpoint.conversion import Layout
from ep2tp.checkpoint.jobs import check_outputs
from ep2tp.checkpoint.reshard import reshard
from ep2tp.errors import CheckpointError
from tests.checkpoint.checkpoints import Model, save


def _file(folder: Path, name: str) -> None:
    (folder / name).write_text("x")


def _in_folder(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "notes.txt").write_text("x")


@pytest.mark.parametrize(
    ("make", "name", "layout"),
    [
        (_file, "shared", "ranks"),
        (_file, "rank-1-of-2", "ranks"),
        (_in_folder, "ep2tp.json", "padded"),
        (_in_folder, "model.safetensors.index.json", "ranks"),
    ],
)
def test_carried_files_in_the_way(tmp_path: Path, make: Callable[[Path, str], None], name: str, layout: Layout) -> None:
    source = Model(files=1).write(tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()
    make(source, name)
    with pytest.raises(CheckpointError, match=f"{name}: the source has a file of this name"):
        reshard(source, tmp_path / "out", tp=2, layout=layout)
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name() -> None:
    with pytest.raises(CheckpointError, match="would be written twice"):
        check_outputs(["a", "b", "a"])


def test_carried_names_that_are_not_utf8(tmp_path: Path) -> None:
    source = Model(files=1).write(tmp_path / "source")
    Path(os.fsdecode(os.fsencode(source) + b"/\xff.txt")).write_text("x")
    with pytest.raises(CheckpointError, match=r"udcff\.txt': .* not UTF-8"):
        reshard(source, tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_left_out_are_reported(tmp_path: Path) -> None:
    source = Model(files=2).write(tmp_path / "source")
    (source / "vision").mkdir()
    (source / ".cache").mkdir()
    for name in ("vision/model.safetensors", "extra.safetensors", ".cache/x.safetensors"):
        save(source / name, {"weight": torch.zeros(2)})
    for name in ("pytorch_model.bin", "model.h5"):
        _file(source, name)
    conversion = reshard(source, tmp_path / "out", tp=7).conversion
    left_out = {"vision/model.safetensors", "extra.safetensors", "pytorch_model.bin", "model.h5"}
    assert set(conversion.left_out) == left_out
    assert not any((tmp_path / "out" / name).exists() for name in left_out)
