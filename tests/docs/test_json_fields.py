"""The page of JSON fields names what the commands print, all of it and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from docs.generate.__main__ import ROOT
from ep2tp.cli import main
from tests.checkpoint.checkpoints import Model
from tests.planner.models import config

PAGE = (ROOT / "docs/reference/json.md").read_text(encoding="utf-8")
LOG = ROOT / "tests/data/logs/vllm-0.32.0-tp2.log"


def named(command: str) -> set[str]:
    """The field names of a command's section: the first column of its tables, and all of its text in code."""
    _, _, rest = PAGE.partition(f"## `ep2tp {command} --json`")
    section = rest.partition("\n## ")[0]
    return set(re.findall(r"`([a-z0-9_]+)`", section))


def printed(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    return found


def test_plan(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config("Qwen3-30B-A3B", "fp8_block128")), encoding="utf-8")
    found = printed("plan", str(path), "--gpus", "4", "--gpu", "L40S", "--link", "pcie4")
    keys = {*found, *found["model"], *found["machine"], *found["plans"][0], *found["verdict"]}
    keys |= set(found["plans"][0]["stock_engines"][0])
    assert keys <= named("plan")
    assert named("plan") - keys <= {"dp", "ep"}


def test_detect() -> None:
    found = printed("detect", str(LOG))
    assert {*found, *found["evidence"][0]} == named("detect") - {
        "vllm",
        "sglang",
        "mixed",
        "unknown",
        "high",
        "medium",
        "low",
    }


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = printed("doctor")
    assert {*found, *found["findings"][0], *found["machine"]} == named("doctor") - {"ready", "degraded", "blocked"}


def test_reshard_and_verify(tmp_path: Path) -> None:
    source = Model("fp8_block_f32").write(tmp_path / "source")
    planned = printed("reshard", str(source), str(tmp_path / "out"), "--tp", "2", "--dry-run")
    done = printed("reshard", str(source), str(tmp_path / "out"), "--tp", "2")
    failed = printed("reshard", str(tmp_path / "nothing"), str(tmp_path / "out2"), "--tp", "2")
    statuses = {"done", "part", "complete", "unneeded", "planned", "failed"}
    assert {planned["status"], done["status"], failed["status"]} <= statuses
    assert {*planned, *done, *failed} == named("reshard") - statuses
    same = printed("verify", str(tmp_path / "out"))
    assert {*same} <= named("verify")
    assert same["status"] in named("verify")
