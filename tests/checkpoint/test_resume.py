"""Nothing is lost: killed at random moments, out of disk, unreadable, or started twice."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ep2tp.checkpoint import earlier, origin, writer
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


def test_source_is_replaced_while_it_is_converted(tmp_path: Path) -> None:
    source = Model("fp8_block_f32", files=3).write(tmp_path / "source")
    other = Model("fp8_block_f32", files=3, seed=1).write(tmp_path / "other")
    names = sorted(path.name for path in source.glob("*.safetensors"))

    def replace(done: int, total: int) -> None:
        if (other / names[-1]).exists():
            (other / names[-1]).replace(source / names[-1])

    with pytest.raises(CheckpointError, match="changed or replaced since its header was read"):
        reshard(source, tmp_path / "out", tp=2, workers=1, report=replace)
    assert not (tmp_path / "out" / "config.json").exists()


def test_source_is_written_to_while_it_is_read(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    path = sorted(copy.glob("*.safetensors"))[0]

    def touch(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        reshard(copy, tmp_path / "out", tp=2, workers=1, report=touch)
    assert not (tmp_path / "out" / path.name).exists()


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
    journal = Journal(tmp_path / "out", "", {})
    with journal.lock(), pytest.raises(CheckpointError, match="another process"):
        reshard(source, tmp_path / "out", tp=2)
    assert reshard(source, tmp_path / "out", tp=2).status == "done"
    with journal.lock(), pytest.raises(CheckpointError, match="another process"):
        reshard(source, tmp_path / "out", tp=4, overwrite=True)
    verify(tmp_path / "out")


def test_ranks_and_the_whole_folder_exclude_each_other(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=2, layout="ranks", ranks=[0, 1])
    with Journal(out, "", {}).lock(["rank-0-of-2"]):
        for options in ({}, {"finish": True}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match="another process"):
                reshard(source, out, tp=2, layout="ranks", **options)  # type: ignore[arg-type]
    with Journal(out, "", {}).lock(), pytest.raises(CheckpointError, match="another process"):
        reshard(source, out, tp=2, layout="ranks", ranks=[1])
    assert reshard(source, out, tp=2, layout="ranks", finish=True).status == "done"


def in_child(pipe: Any, barrier: Any, *arguments: Any, **options: Any) -> None:
    if barrier:
        check_together(barrier)
    try:
        pipe.send(reshard(*arguments, **options).status)
    except CheckpointError as error:
        pipe.send(str(error))


def check_together(barrier: Any) -> None:
    """In this process, check the folder at the same time as another one does, as long as that one can."""
    check_free = Journal.check_free
    waits = iter(
        (30, 30, 1)
    )  # before the lock, under the shared lock, and before one begins, for which the other waits

    def check_at_once(journal: Journal, replace: bool = False) -> None:
        check_free(journal, replace)
        with suppress(threading.BrokenBarrierError):
            barrier.wait(next(waits))

    Journal.check_free = check_at_once  # type: ignore[method-assign]


def together(*calls: tuple[Path, Path, dict[str, Any]], check_at_once: bool = False) -> list[str]:
    """What several processes that convert at the same time end with: a status, or an error."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads, as other tests leave, can hang
    barrier = context.Barrier(len(calls)) if check_at_once else None
    children = []
    for source, out, options in calls:
        end, other_end = context.Pipe(duplex=False)
        child = context.Process(target=in_child, args=(other_end, barrier, source, out), kwargs=options)
        child.start()
        children.append((child, end))
    outcomes = [end.recv() if end.poll(60) else "nothing" for _, end in children]
    for child, _ in children:
        child.join(60)
    return outcomes


def test_two_processes_race(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "whole", tp=2)
    out = tmp_path / "out"
    for options in ({"tp": 2}, {"tp": 2, "overwrite": True}, {"tp": 2, "overwrite": True}):
        outcomes = together((source, out, options), (source, out, options))
        assert "done" in outcomes
        assert all(outcome in ("done", "complete") or "another process" in outcome for outcome in outcomes), outcomes
        assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("ends_in_time", [True, False])
def test_another_process_ends_between_two_looks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_in_time: bool, dry_run: bool
) -> None:
    """Looked at while another process exchanges its plan for the manifest, a folder seems to be nobody's."""
    out, looks = tmp_path / "out", [0]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reshard(source, out, tp=2)
    load = earlier.load

    def load_late(path: Path) -> dict[str, Any] | None:
        looks[0] += 1
        if looks[0] == 2:  # the manifest was not there yet; the plan is gone
            reshard(source, out, tp=2)
            if not ends_in_time:
                (out / earlier.LOCK).touch()
            assert path.name == "plan.json"
        return load(path)

    with monkeypatch.context() as patch:
        patch.setattr(earlier, "load", load_late)
        if dry_run and not ends_in_time:
            with pytest.raises(CheckpointError, match="or another process is writing"):
                reshard(source, out, tp=2, overwrite=True, dry_run=True)
        else:
            result = reshard(source, out, tp=2, overwrite=True, dry_run=dry_run)
            assert result.status == ("planned" if dry_run else "done")
    assert looks[0] > 2 and (out / earlier.LOCK).exists() == (dry_run and not ends_in_time)
    verify(out, source)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{"ranks": [0]}, {"finish": True}, {}], ids=str)
def test_a_killed_process_lock_goes_from_a_finished_folder(source: Path, tmp_path: Path, options: Any) -> None:
    reshard(source, tmp_path / "out", tp=2, layout="ranks")
    expected = tree(tmp_path / "out")
    (tmp_path / "out" / earlier.LOCK).touch()
    assert reshard(source, tmp_path / "out", tp=2, layout="ranks", **options).status == "complete"
    assert tree(tmp_path / "out") == expected and not (tmp_path / "out" / earlier.STATE).exists()


def test_a_refusal_under_the_lock_leaves_no_state(source: Path, tmp_path: Path) -> None:
    """A lock is there, so that what is seen without it does not count."""
    reshard(source, tmp_path / "out", tp=2)
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for folder, why in (("out", "tokenizer.json: is missing"), ("notes", "holds files that ep2tp did not write")):
        (tmp_path / folder / earlier.LOCK).touch()
        with pytest.raises(CheckpointError, match=why):
            reshard(source, tmp_path / folder, tp=2)
        assert not (tmp_path / folder / earlier.LOCK).exists() and not (tmp_path / folder / earlier.STATE).exists()
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_another_conversion_is_named_while_its_process_is_at_work(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2)
    with Journal(tmp_path / "out", "", {}).lock(), pytest.raises(CheckpointError, match="holds another conversion"):
        reshard(source, tmp_path / "out", tp=4)


def test_two_conversions_begin_at_once(source: Path, tmp_path: Path) -> None:
    """Different sources, different ranks: both found the folder empty, and one of them may have it."""
    other = Model("fp8_block_f32", files=12, seed=1).write(tmp_path / "other")
    out, options = tmp_path / "out", {"tp": 2, "layout": "ranks"}
    calls = ((source, out, options | {"ranks": [0]}), (other, out, options | {"ranks": [1]}))
    outcomes = together(*calls, check_at_once=True)
    assert "part" in outcomes and any("another conversion" in outcome for outcome in outcomes)
    first, rank = (source, 1) if outcomes[0] == "part" else (other, 0)
    reshard(first, out, tp=2, layout="ranks", ranks=[rank])
    reshard(first, out, tp=2, layout="ranks", finish=True)
    verify(out, first)


def test_notes_of_another_conversion_do_not_count(tmp_path: Path) -> None:
    ours, theirs = (Journal(tmp_path, fingerprint, {"a/b": 1}) for fingerprint in ("ours", "theirs"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x")
    with ours.lock():
        theirs.record("a/b", 1, "0", {})
        assert ours.done(["a/b"]) == {} and "a/b" in theirs.done(["a/b"])


def test_what_was_being_written_is_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard(source, out, tp=2, layout="ranks", ranks=[0])
    writing, fetched = out / ".ep2tp" / "writing", out / ".ep2tp" / "fetch-3" / "model.safetensors"
    fetched.parent.mkdir()
    for path in (fetched, writing / "rank-0-of-2__x", writing / "rank-1-of-2__x"):
        path.write_bytes(bytes(100))
    whole = reshard(source, out, tp=2, layout="ranks", dry_run=True).needed
    reshard(source, out, tp=2, layout="ranks", ranks=[1])
    assert [path.name for path in writing.iterdir()] == ["rank-0-of-2__x"]  # another machine may be writing it
    files = reshard(source, out, tp=2, layout="ranks", dry_run=True)
    ranks = sum(size for name, size in files.conversion.sizes().items() if name.startswith("rank-1"))
    assert whole - files.needed == ranks - 100
    seen: list[bool] = []
    (out / "shared" / "model-00001-of-00012.safetensors").unlink()
    reshard(
        source, out, tp=2, layout="ranks", report=lambda *_: seen.append(fetched.exists() or any(writing.glob("*x")))
    )
    assert seen and not any(seen)


def test_ranks_by_several_processes(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "whole", tp=4, layout="ranks")
    out = tmp_path / "out"
    for ranks in ([1, 2], [3]):
        assert reshard(source, out, tp=4, layout="ranks", ranks=ranks).status == "part"
    with pytest.raises(CheckpointError, match="rank-0-of-4"):
        reshard(source, out, tp=4, layout="ranks", finish=True)
    with Journal(out, "", {}).lock(["rank-1-of-4"]):  # another machine at work on rank 1
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


def test_another_mount_point_is_the_same_conversion(tmp_path: Path) -> None:
    source = Model().write(tmp_path / "source")
    reshard(source, tmp_path / "out", tp=7, layout="ranks", ranks=[0])
    source = source.rename(tmp_path / "elsewhere")
    assert reshard(source, tmp_path / "out", tp=7, layout="ranks").resumed > 0
    verify(tmp_path / "out", source)
