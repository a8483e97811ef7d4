"""What the harness makes of an engine that fails, and of figures that are not a plan's own."""

from __future__ import annotations

import signal
from typing import Any

import ep_vs_tp
import ep_vs_tp_table
import pytest

REFUSAL = "ValueError: Weight input_size_per_partition = 2736 is not divisible by weight quantization block_k = 128."


@pytest.mark.parametrize(
    ("log", "reason"),
    [(f"INFO: starting\n{REFUSAL}\n", REFUSAL), ("(Worker pid=1) RuntimeError: out\n", "RuntimeError: out")],
)
def test_the_reason_of_a_failed_engine_is_one_line_of_its_log(log: str, reason: str) -> None:
    assert ep_vs_tp._failure(1, log) == reason


def test_an_engine_that_hangs_is_said_to() -> None:
    assert "time limit" in ep_vs_tp._failure(-signal.SIGALRM, "")


@pytest.mark.parametrize(
    ("ranks", "more", "is_marked"), [(1, {}, False), (4, {}, True), (4, {"own_experts": True}, False)]
)
def test_steps_of_ranks_that_drew_the_same_experts_are_marked(
    ranks: int, more: dict[str, bool], is_marked: bool
) -> None:
    figure = {"ms": 2.0, "least": 1.9, "most": 2.1}
    bound = {"ms": 1.0, "error": -0.5}
    line: dict[str, Any] = {
        "launch": "DEP", "link": "host", "cuda_graphs": True, "data_parallel_size": ranks, **more,
        "decode": {"64": figure}, "prefill": figure,
        "planner": {"built_in": {"decode": {"64": bound}, "prefill": bound}},
    }  # fmt: skip
    _link, _launch, decode, prefill = ep_vs_tp_table.row(line)
    assert prefill == "2.00 (1.90 to 2.10) / 1.00 (-50%)"
    assert decode == ("2.00 (1.90 to 2.10) †" if is_marked else prefill)


def test_a_launch_that_was_not_started_is_a_row_of_its_reason() -> None:
    line = {"launch": "DEP", "link": "socket", "error": "not started: 16 s of the budget were left"}
    assert ep_vs_tp_table.row(line) == ["socket", "DEP", line["error"]]
