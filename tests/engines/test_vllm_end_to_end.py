"""Real vLLM engines on this CPU: launches that assume expert parallelism run as TP, with the tokens of one rank.

Each engine takes about half a minute to start, so references are shared and every rewritten run checks all it can.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.launch import EngineRun, run_engine
from ep2tp.demo.tiny import TinyModel
from tests.engines.conftest import ODD, OneRank, tiny_model

pytestmark = pytest.mark.engine

# 75 divides by 3 and not by 2, 74 the other way round; 77 and 325 by neither.
MODELS = {
    "deepseek_v3": ODD,
    "deepseek_v3 with MTP": replace(ODD, mtp_layers=1),
    "kimi_k2": TinyModel("kimi_k2", expert_size=74, experts=12, top_k=3, dense_size=325),
    "glm4_moe": TinyModel("glm4_moe", heads=12, kv_heads=6, expert_size=75, dense_size=325),
    "qwen3_moe": TinyModel("qwen3_moe", heads=12, kv_heads=6, expert_size=77, top_k=3),
}
LAUNCHES = [("deepseek_v3", 2), ("deepseek_v3", 3), ("kimi_k2", 3), ("glm4_moe", 2), ("qwen3_moe", 3)]


def engine_run(folder: Path, name: str, mode: str, **options: Any) -> EngineRun:
    model = tiny_model(folder, MODELS[name])
    label = re.sub(r"\W+", "-", "-".join([name, mode, *(f"{key}{value}" for key, value in options.items())]))
    return run_engine(folder, label, {"model": str(model), "dtype": "float32", **options}, mode)


def assert_tensor_parallel(run: EngineRun, ranks: int) -> None:
    assert run.result is not None, run.log[-3000:]
    counts = run.result["collectives"]
    assert len(counts) == ranks
    for rank in counts:
        assert rank["layers"] > 0
        assert rank["inside"] == {"all_reduce": rank["layers"]}
    # Strings by which vLLM shows expert parallelism: the workers' name, and a line of the expert map.
    assert "_EP0" not in run.log
    assert "Expert parallelism is enabled" not in run.log


@pytest.mark.parametrize(("name", "ranks"), LAUNCHES)
def test_ep_recipe_runs_as_tp_with_the_tokens_of_one_rank(
    name: str, ranks: int, tiny_models: Path, one_rank: OneRank
) -> None:
    run = engine_run(tiny_models, name, "auto", tensor_parallel_size=ranks, enable_expert_parallel=True)
    assert_tensor_parallel(run, ranks)
    assert run.result is not None
    assert run.result["tokens"] == one_rank(MODELS[name])
    assert "rewrote this launch to tensor parallelism" in run.ep2tp_lines[0]


def test_speculation_with_an_mtp_layer_of_odd_size_runs(tiny_models: Path, one_rank: OneRank) -> None:
    """vLLM loads the MTP layer's experts as a second model, from the same files."""
    speculation = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    recipe = speculation | {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    run = engine_run(tiny_models, "deepseek_v3 with MTP", "auto", **recipe)
    assert_tensor_parallel(run, 2)
    assert run.result is not None
    assert run.result["tokens"] == one_rank(MODELS["deepseek_v3 with MTP"])


@pytest.mark.parametrize(("name", "mode"), [("deepseek_v3", "auto"), ("qwen3_moe", "on")])
def test_plain_tp_launch_with_odd_sizes_runs(name: str, mode: str, tiny_models: Path, one_rank: OneRank) -> None:
    run = engine_run(tiny_models, name, mode, tensor_parallel_size=2)
    assert_tensor_parallel(run, 2)
    assert run.result is not None
    assert run.result["tokens"] == one_rank(MODELS[name])
    assert "left the launch's parallelism as it is" in run.ep2tp_lines[0]
    assert ("ep2tp kernel: 3 MoE layers" in run.log) == (mode == "on")


def test_where_all_divides_only_one_log_line_is_added(tiny_models: Path) -> None:
    model = TinyModel("qwen3_moe", heads=12, kv_heads=6, expert_size=96).write(tiny_models / "divides", "float32")
    engine = {"model": str(model), "dtype": "float32", "tensor_parallel_size": 2}
    stock, beside = (run_engine(tiny_models, f"divides-{mode}", engine, mode) for mode in ("off", "auto"))
    assert stock.result is not None
    assert beside.result is not None
    assert stock.result == beside.result
    assert len(beside.ep2tp_lines) == 1
    assert beside.ep2tp_lines[0].endswith("nothing to pad")
    assert len(logged(beside)) == len(logged(stock)) + 1


def logged(run: EngineRun) -> list[str]:
    """Log lines of the process that the user starts (workers and the engine core log in no fixed order or number).

    Without those of the shutdown: whether workers end by themselves in time differs from run to run.
    """
    lines = re.findall(r"^\(MainProcess.* INFO .*", run.log, flags=re.MULTILINE)
    return [line for line in lines if "[shutdown]" not in line]
