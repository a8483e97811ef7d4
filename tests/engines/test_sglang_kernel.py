"""ep2tp's kernel in a real SGLang on this CPU, in place of SGLang's own, with plain torch standing in for Triton."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from ep2tp.demo.engines import SGLANG
from ep2tp.demo.launch import EngineRun, run_engine
from ep2tp.demo.tiny import TinyModel

pytestmark = pytest.mark.engine

STAND_IN = Path(__file__).parent / "kernel_stand_in"
MODEL = TinyModel("deepseek_v3", heads=8, expert_size=96, shared_experts=1, dense_size=384)


def run(model: Path, kernel: str, monkeypatch: pytest.MonkeyPatch) -> EngineRun:
    monkeypatch.setenv("EP2TP_KERNEL", kernel)
    recipe = {"model_path": str(model), "dtype": "float32", "tp_size": 2, "ep_size": 2}
    return run_engine(model.parent, kernel, recipe, "auto", SGLANG)


def test_tokens_through_the_seam_are_those_of_sglangs_own_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODEL.write(tmp_path / "model", "float32")
    monkeypatch.setenv("SGLANG_CPU_SHIM_PAD", "ep2tp")  # SGLang itself would pad the slices of a CPU
    stock = run(model, "auto", monkeypatch)
    paths = [str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    ours = run(model, "ep2tp", monkeypatch)
    assert stock.result is not None, stock.log[-3000:]
    assert ours.result is not None, ours.log[-3000:]
    assert ours.result["tokens"] == stock.result["tokens"]
    assert [r["inside"] for r in ours.result["collectives"]] == [r["inside"] for r in stock.result["collectives"]]
    ran = re.findall(r"STAND-IN ran for M=(\d+), weights \[(\d+), (\d+), (\d+)\]", ours.log)
    assert {(e, k, i) for _, e, k, i in ran} == {(str(MODEL.experts), str(MODEL.hidden), "48")}
    assert {"1", "3", "5", "12"} <= {tokens for tokens, *_ in ran}  # decode steps, and prompts
    assert f"ep2tp kernel: 2 MoE layers: ep2tp's on E={MODEL.experts} K={MODEL.hidden} I=48" in ours.log
    assert "ep2tp kernel: 2 MoE layers: the engine's: ep2tp's kernel runs on NVIDIA GPUs" in stock.log
