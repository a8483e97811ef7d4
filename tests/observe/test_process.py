"""Processes: real ones with an engine's title, and maps as a kernel writes them."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from ep2tp.errors import SourceError
from ep2tp.observe.evidence import Plan
from ep2tp.observe.process import read_process
from ep2tp.observe.verdict import judge


def test_a_launchers_workers_are_found_by_their_titles() -> None:
    """A parent with two children that carry the titles of vLLM's workers."""
    script = "(exec -a VLLM::Worker_TP0_EP0 sleep 60) & (exec -a VLLM::Worker_TP1_EP1 sleep 60) & wait"
    parent = subprocess.Popen(["bash", "-c", script], start_new_session=True)
    try:
        for _ in range(100):
            verdict = judge(read_process(parent.pid))
            if verdict.engine:
                break
            time.sleep(0.05)
    finally:
        os.killpg(parent.pid, 15)
        parent.wait()
    assert verdict.engine == "vllm"
    assert verdict.fits == {Plan.TEP, Plan.DEP}
    assert any("no library of DeepEP" in piece.reading.says for piece in verdict.evidence)


def process(proc: Path, pid: int, parent: int, title: str, maps: str = "") -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(title.encode() + b"\0")
    (folder / "stat").write_text(f"{pid} (a) b (c) S {parent} 1 1 0 -1")
    (folder / "maps").write_text("".join(f"7f00-7f01 r-xp 00000000 08:01 42 {path}\n" for path in maps.split()))


def test_libraries_are_told_with_care(tmp_path: Path) -> None:
    process(tmp_path, 1, 0, "vllm serve m")
    process(tmp_path, 2, 1, "VLLM::Worker_TP0", "/v/torch/lib/libtorch_nvshmem.so /v/deep_ep_cpp.abi3.so")
    process(tmp_path, 3, 0, "VLLM::Worker_DP0_EP0")  # another launch's
    verdict = judge(read_process(1, tmp_path))
    assert verdict.plan is Plan.TP  # mapped is not used
    [library] = [piece for piece in verdict.evidence if "deep_ep" in piece.text]
    assert "pid 2" in library.text
    assert not any("torch" in piece.text for piece in verdict.evidence)


def test_no_such_process() -> None:
    with pytest.raises(SourceError, match="process 999999999: not running"):
        list(read_process(999999999))


def test_another_users_process_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(tmp_path, 1, 0, "python")

    def denied(maps: str) -> list[str]:
        raise PermissionError(13, "Permission denied", maps)

    monkeypatch.setattr("ep2tp.observe.process.mapped_libraries", denied)
    with pytest.raises(SourceError, match="by its owner and by root only"):
        list(read_process(1, tmp_path))
