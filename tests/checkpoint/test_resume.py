"""Nothing is lost: killed at random moments, out of disk, unreadable, or started twice."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ep2tp.checkpoint import origin, writer
from ep2tp.checkpoint.journal import Journal
from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from ep2tp.errors import CheckpointError
from tests.checkpoint.checkpoints import Model

KILLS = 50


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Model("fp8_block_f32", files=12).write(tmp_path_factory.mktemp("models") / "source")


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed(source: Path, out: Path, layout: Any, delay: float) -> bool:
    """Convert in a child and kill it after ``delay`` seconds; whether the kill came before the end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            reshard(source, out, tp=2, layout=layout, workers=2)
            code = 0
        finally:
            os._exit(code)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("layout", ["padded", "ranks"])
def test_killed_at_random_moments(source: Path, tmp_path: Path, layout: Any) -> None:
    started = time.monotonic()
    reshard(source, tmp_path / "reference", tp=2, layout=layout, workers=2)
    duration = time.monotonic() - started
    expected = tree(tmp_path / "reference")
    chance = random.Random(0)
    kills = tries = resumed = 0
    while kills < KILLS // 2:
        out = tmp_path / f"out{tries}"
        tries += 1
        while killed(source, out, layout, chance.uniform(0, duration)):
            kills += 1
            partial = [path for path in out.rglob("*.safetensors") if ".ep2tp" not in path.parts]
            resumed += bool(partial)
            for path in partial:  # whatever has its name is whole
                name = str(path.relative_to(out))
                assert hashlib.sha256(path.read_bytes()).hexdigest() == expected[name]
        reshard(source, out, tp=2, layout=layout)
        assert tree(out) == expected
    assert resumed


def test_disk_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.write, [500_000]

    def write(file: int, data: Any) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "write", write)
        with pytest.raises(CheckpointError, match=r"No space left on device.*same command again"):
            reshard(source, tmp_path / "out", tp=2, workers=1)
    kept = len(list((tmp_path / "out").glob("*.safetensors")))
    assert 0 < kept < 12 and not (tmp_path / "out" / "config.json").exists()
    assert reshard(source, tmp_path / "out", tp=2).resumed == kept
    verify(tmp_path / "out", source)


def test_read_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, [0]

    def preadv(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(origin.os, "preadv", preadv)
        with pytest.raises(CheckpointError, match="Input/output error"):
            reshard(source, tmp_path / "out", tp=2, workers=1)
    reshard(source, tmp_path / "out", tp=2)
    verify(tmp_path / "out", source)


def test_second_process_is_refused(source: Path, tmp_path: Path) -> None:
    plan = reshard(source, tmp_path / "out", tp=2, dry_run=True).conversion
    journal = Journal(tmp_path / "out", plan.fingerprint())
    with journal.lock(["all"]), pytest.raises(CheckpointError, match="another process"):
        reshard(source, tmp_path / "out", tp=2)
    assert reshard(source, tmp_path / "out", tp=2).status == "done"


def test_ranks_by_several_processes(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "whole", tp=4, layout="ranks")
    out = tmp_path / "out"
    for ranks in ([1, 2], [3]):
        assert reshard(source, out, tp=4, layout="ranks", ranks=ranks).status == "part"
    with pytest.raises(CheckpointError, match="rank-0-of-4"):
        reshard(source, out, tp=4, layout="ranks", finish=True)
    plan = reshard(source, out, tp=4, layout="ranks", dry_run=True).conversion
    with Journal(out, plan.fingerprint()).lock(["rank-1-of-4"]):  # another machine at work on rank 1
        with pytest.raises(CheckpointError, match="rank-1-of-4"):
            reshard(source, out, tp=4, layout="ranks", ranks=[1])
        reshard(source, out, tp=4, layout="ranks", ranks=[0])
    assert reshard(source, out, tp=4, layout="ranks", finish=True).status == "done"
    assert tree(out) == tree(tmp_path / "whole")


def test_changed_source_is_another_conversion(tmp_path: Path) -> None:
    source = Model().write(tmp_path / "source")
    reshard(source, tmp_path / "out", tp=7, layout="ranks", ranks=[0])
    os.utime(sorted(source.glob("*.safetensors"))[0], (1, 1))
    with pytest.raises(CheckpointError, match="another conversion"):
        reshard(source, tmp_path / "out", tp=7, layout="ranks")
