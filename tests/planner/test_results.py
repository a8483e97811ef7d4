"""The planner's figures beside the measured ones in docs/results are those of this planner."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "docs" / "results").glob("ep_vs_tp-*.jsonl"))
sys.path.append(str(ROOT / "tests" / "benchmarks"))

from ep_vs_tp_planner import recomputed


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_figures_are_up_to_date(path: Path) -> None:
    stored = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert any("planner" in line for line in stored)
    for old, new in zip(stored, recomputed(path), strict=True):
        assert old.get("planner") == new.get("planner"), f"run tests/benchmarks/ep_vs_tp_planner.py {path}"
