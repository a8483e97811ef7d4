"""ep2tp's kernel in a real vLLM on this CPU, in place of vLLM's own, with plain torch standing in for Triton."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.launch import EngineRun, run_engine
from ep2tp.demo.tiny import TinyModel

pytestmark = pytest.mark.engine

STAND_IN = Path(__file__).parent / "kernel_stand_in"
MODEL = TinyModel("deepseek_v3", expert_size=96, shared_experts=1, dense_size=192)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("model") / "model", "float32")


def run(model: Path, kernel: str, monkeypatch: pytest.MonkeyPatch, stands_in: bool = False) -> EngineRun:
    monkeypatch.setenv("EP2TP_KERNEL", kernel)
    if stands_in:
        paths = [str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    recipe = {"model": str(model), "dtype": "float32", "tensor_parallel_size": 2, "enable_expert_parallel": True}
    return run_engine(model.parent, f"{kernel}-{stands_in}", recipe, "auto")


def test_tokens_through_the_seam_are_those_of_vllms_own_kernel(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = run(model, "engine", monkeypatch)
    ours = run(model, "ep2tp", monkeypatch, stands_in=True)
    assert stock.result is not None, stock.log[-3000:]
    assert ours.result is not None, ours.log[-3000:]
    assert ours.result["tokens"] == stock.result["tokens"]
    assert [rank["inside"] for rank in ours.result["collectives"]] == [
        rank["inside"] for rank in stock.result["collectives"]
    ]
    experts = MODEL.experts
    ran = re.findall(r"STAND-IN ran for M=(\d+), weights \[(\d+), (\d+), (\d+)\]", ours.log)
    assert {(e, k, i) for _, e, k, i in ran} == {(str(experts), str(MODEL.hidden), "48")}
    assert {"1", "3", "5", "12"} <= {tokens for tokens, *_ in ran}  # decode steps, and prompts
    assert f"ep2tp kernel: 2 MoE layers: ep2tp's on E={experts} K={MODEL.hidden} I=48" in ours.log
    assert "kernel: ep2tp's (EP2TP_KERNEL=ep2tp)" in ours.log
    assert "ep2tp kernel:" not in stock.log


def test_a_layout_that_the_kernel_does_not_take_is_left_to_vllm_or_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = run(model, "auto", monkeypatch)
    assert auto.result is not None, auto.log[-3000:]
    assert re.search(
        r"ep2tp kernel: 2 MoE layers: the engine's: vLLM's \w*CPUUnquantizedExperts keeps weights", auto.log
    )
    forced = run(model, "ep2tp", monkeypatch)
    assert forced.result is None
    assert re.search(
        r"LaunchError: EP2TP_KERNEL=ep2tp: model\.layers\.\d+\.mlp\.experts\S*: vLLM's \w+ keeps", forced.log
    )
