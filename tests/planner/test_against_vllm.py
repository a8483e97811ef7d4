"""The planner's weights, collective counts and bytes against a real vLLM of two ranks, a tiny model on this CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.tiny import TinyModel
from ep2tp.planner.gpus import DEFAULT
from ep2tp.planner.layouts import Layout
from ep2tp.planner.links import built_in
from ep2tp.planner.memory import shard_plan, stages_of, weights_of
from ep2tp.planner.source import load_model
from ep2tp.planner.timing import Setting, step_collectives

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
BATCH, SHORT, LONG = 1, 3, 7  # requests that arrive one by one would make steps of several sizes


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(the model, what its two ranks reported), of an expert-parallel command line that ep2tp rewrites to TP."""
    folder = tmp_path_factory.mktemp("traced")
    TinyModel(heads=8, expert_size=64).write(folder / "model")
    engine = {"model": str(folder / "model"), "tensor_parallel_size": 2, "enable_expert_parallel": True}
    request = {"engine": {**engine, "dtype": "bfloat16"}, "batch": BATCH, "tokens": [SHORT, LONG]}
    (folder / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.planner.traced_engine",
            str(folder / "request.json"),
            str(folder / "result.json"),
        ],
        env=os.environ | CPU_ENVIRONMENT | {"EP2TP": "on"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "model", json.loads((folder / "result.json").read_text())


def test_weights_a_rank(traced: tuple[Path, dict[str, Any]]) -> None:
    model, found = traced
    for source in (model, model / "config.json"):  # added up from headers, and computed from the config
        facts, inventory = load_model(str(source))
        layout = Layout("TP", tp=2)
        computed = weights_of(facts, inventory, layout, shard_plan(facts, layout))
        for names in found["weights"]:
            held: Counter[str] = Counter()
            for name, size in names.items():
                held[part_of(name)] += size
            assert held["routed"] == computed.routed
            norms = held["norms of attention"] if source is model else 0  # left out of what a config alone tells
            assert held["attention"] + norms == computed.attention
            assert held["embeddings"] == computed.embeddings
            assert held["dense"] == computed.dense
            assert held["shared"] == computed.shared
            assert sum(names.values()) == pytest.approx(computed.total, rel=0.002)  # norms, and what FP32 routers add


def part_of(name: str) -> str:
    """Which of the planner's parts a parameter of vLLM's DeepSeek-V3 is."""
    if name.endswith(("w13_weight", "w2_weight")):
        return "routed"
    if "embed_tokens" in name or "lm_head" in name:
        return "embeddings"
    if "self_attn" in name:
        return "norms of attention" if "layernorm" in name else "attention"
    if "shared_experts" in name:
        return "shared"
    return "dense" if "layers.0.mlp" in name else "other"


def test_collectives_of_a_decode_step(traced: tuple[Path, dict[str, Any]]) -> None:
    """Kind, number and bytes: the longer generation's less the shorter one's is that many more decode steps."""
    model, found = traced
    facts, inventory = load_model(str(model))
    layout = Layout("TP", tp=2)
    setting = Setting(facts, inventory, shard_plan(facts, layout), layout, DEFAULT, built_in()["host"])
    [stage] = stages_of(facts, inventory, 1)
    computed: Counter[tuple[str, int]] = Counter()
    for times, collective in step_collectives(setting, stage, BATCH, BATCH):
        computed[collective.kind, round(collective.sent)] += times
    for rank in (0, 1):
        few, many = (Counter(sent(operation) for operation in trace[rank]) for trace in found["traces"])
        many.subtract(few)
        steps = LONG - SHORT
        assert {key: count / steps for key, count in many.items() if count} == computed
    layers = facts.layers + len(inventory.layers.moe) + len(inventory.layers.dense)
    assert computed["all_reduce", 2 * 1 * BATCH * facts.hidden * 2 // 2] == layers + 1


def sent(operation: list[Any]) -> tuple[str, int]:
    """(kind, bytes that a rank of two sends) of a traced operator: its shapes, in BF16, by the ring's formulas."""
    kind, name, shapes = operation
    assert name.startswith("_C::shm_"), name
    payload = 2 * prod(shapes[1])  # all_reduce: the whole payload; all_gather: this rank's part of it
    return kind, {"all_reduce": 2 * payload // 2, "all_gather": payload}[kind]
