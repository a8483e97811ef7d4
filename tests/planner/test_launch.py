"""Printed launches are ones that the engine takes: no command for what the planner itself says is refused."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ep2tp.planner.advise import advise
from ep2tp.planner.launch import launches
from ep2tp.planner.report import print_report
from tests.planner.models import assessed


@pytest.mark.parametrize("plan", ["TEP 4", "DEP 4"])
def test_no_command_where_an_engine_refuses_the_number_of_experts(plan: str) -> None:
    """vLLM deals 128 experts out over 3 ranks unevenly; SGLang asserts."""
    question, plans = assessed("GLM-4.5-Air", "bf16", 3, "H200", "host", batches=(1,))
    found = launches(question, plans[plan.replace("4", "3")])
    assert found["vllm"].command
    assert not found["sglang"].command
    assert "SGLang 0.5.23 refuses experts (128 over 3)" in str(found["sglang"])
    question, plans = assessed("GLM-4.5-Air", "bf16", 4, "H200", "host", batches=(1,))
    assert launches(question, plans[plan])["sglang"].command


def test_the_chosen_plan_is_among_those_that_do_not_divide() -> None:
    question, plans = assessed("GLM-4.5-Air", "bf16", 3, "H200", "host", batches=(1,))
    chosen = [plans["DEP 3"]]
    console = Console(file=io.StringIO(), width=200)
    print_report(console, question, chosen, advise(question, chosen))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "DEP 3 does not divide" in text
    assert "# SGLang 0.5.23 refuses experts (128 over 3)" in text
    assert "--dp-size" not in text


def test_ep2tp_does_not_pad_a_plan_with_whole_experts_but_reshard_does() -> None:
    question, plans = assessed("GLM-4.5/4.6/4.7", "fp8_block128", 8)
    for launch in launches(question, plans["TEP 8"]).values():
        assert not launch.command
        assert "refuses shared (1536 over 8)" in launch.note
        assert "ep2tp reshard --tp 8" in launch.note
    for launch in launches(question, plans["TP 8"]).values():
        assert launch.environment["EP2TP"] == "on"
        assert launch.command
