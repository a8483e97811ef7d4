"""Real SGLang engines on this CPU: EP recipes run as TP, with the tokens of one rank; and what ``ep2tp reshard`` wrote.

Each engine takes about half a minute to start, so references are shared and every run checks all it can. Where a test
says so, SGLang's own padding for CPUs is off, and ep2tp pads the streamed weights as it does on GPUs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from ep2tp.checkpoint.reshard import reshard
from ep2tp.demo.engines import SGLANG
from ep2tp.demo.launch import EngineRun, run_engine
from ep2tp.demo.tiny import TinyModel
from tests.engines.conftest import ODD, OneRank, tiny_model

pytestmark = pytest.mark.engine

# 75 and 325 do not divide by 2.
MODELS = {
    "deepseek_v2": TinyModel("deepseek_v2", heads=8, expert_size=75, shared_experts=2, dense_size=325),
    "deepseek_v3": ODD,
    "kimi_k2": TinyModel("kimi_k2", expert_size=75, experts=12, top_k=3, dense_size=325),
    "glm4_moe": TinyModel("glm4_moe", heads=12, kv_heads=6, expert_size=75, dense_size=325),
}
DEP = {"moe_a2a_backend": "deepep", "enable_dp_attention": True, "dp_size": 2, "moe_dense_tp_size": 1}
RECIPES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "deepep with attention DP": ("deepseek_v3", DEP | {"enable_two_batch_overlap": True}, True),
    "TEP": ("deepseek_v2", {"ep_size": 2}, True),
    "mooncake with EPLB": ("kimi_k2", {"moe_a2a_backend": "mooncake", "enable_eplb": True}, True),
    "DWDP": ("glm4_moe", {"dwdp_size": 2}, True),
    "deepep, SGLang pads": ("glm4_moe", {"moe_a2a_backend": "deepep"}, False),
}


def engine_run(folder: Path, label: str, model: Path, mode: str, **options: Any) -> EngineRun:
    name = re.sub(r"\W+", "-", f"sglang-{label}")
    run = run_engine(folder, name, {"model_path": str(model), "dtype": "float32", **options}, mode, SGLANG)
    assert run.result is not None, run.log[-3000:]
    return run


def assert_only_all_reduce(run: EngineRun, ranks: int, layers: int) -> None:
    assert run.result is not None
    assert len(run.result["collectives"]) == ranks
    for rank in run.result["collectives"]:
        assert rank["layers"] > 0
        assert rank["inside"] == {"all_reduce": rank["layers"] * SGLANG.all_reduces(layers)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_ep_recipe_runs_as_tp_with_the_tokens_of_one_rank(
    recipe: str, tiny_models: Path, one_rank: OneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options, ep2tp_pads = RECIPES[recipe]
    if ep2tp_pads:
        monkeypatch.setenv("SGLANG_CPU_SHIM_PAD", "ep2tp")
    run = engine_run(tiny_models, recipe, tiny_model(tiny_models, MODELS[name]), "auto", tp_size=2, **options)
    assert_only_all_reduce(run, 2, MODELS[name].layers)
    assert run.result is not None
    assert run.result["tokens"] == one_rank(MODELS[name])
    report = "\n".join(run.ep2tp_lines)
    assert "rewrote this launch to tensor parallelism" in report
    assert ("routed (moe_intermediate_size)  75" in report) and ("80" in report) is ep2tp_pads
    assert not re.search(r"TP\d EP\d", run.log)  # SGLang's prefix of a rank's lines under expert parallelism
    assert "expert parallel size is adjusted" not in run.log


def test_padded_checkpoint_in_stock_sglang(
    tiny_models: Path, one_rank: OneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    reshard(tiny_model(tiny_models, ODD), tiny_models / "sglang-padded", tp=2)
    run = engine_run(tiny_models, "padded", tiny_models / "sglang-padded", "off", tp_size=2)
    assert run.result is not None
    assert run.result["tokens"] == one_rank(ODD)


def test_rank_files_in_sglang(tiny_models: Path, one_rank: OneRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SGLang's own padding, which moves the borders of the slices on a CPU."""
    folder = tiny_models / "sglang-ranks"
    reshard(tiny_model(tiny_models, ODD), folder, tp=2, layout="ranks")
    monkeypatch.setenv("SGLANG_CPU_SHIM_PAD", "ep2tp")
    run = engine_run(tiny_models, "ranks", folder, "off", tp_size=2)
    assert run.result is not None
    assert run.result["tokens"] == one_rank(ODD)
    read = {int(rank): float(size) * 1e9 for rank, size in re.findall(r"rank (\d) of 2 read ([\d.]+) GB", run.log)}
    sizes = {name: entry["size"] for name, entry in json.loads((folder / "ep2tp.json").read_text())["outputs"].items()}
    for rank, size in read.items():
        own = sum(sizes[name] for name in sizes if name.startswith((f"rank-{rank}-", "shared/")))
        assert size <= 1.02 * own
    assert sorted(read) == [0, 1]
