"""The oldest SGLang that ep2tp knows, 0.5.17, whose launches resolve elsewhere (``ServerArgs.__post_init__``).

It lies in a folder of the environment that is put in front of the newer one (see the Makefile), and runs on this CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from ep2tp.demo.engines import SGLANG
from ep2tp.demo.launch import EngineRun, run_engine
from ep2tp.demo.tiny import TinyModel
from tests.engines.conftest import tiny_model

FOLDER = Path(sys.prefix) / "sglang-0.5.17"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is missing; 'make test' installs it")

REPOSITORY = Path(__file__).parents[2]
IN_FRONT = {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(REPOSITORY)])}
RESOLVE = """
import dataclasses, json, sys
from tests.engines import test_sglang_launch as launch

fields = {field.name for field in dataclasses.fields(launch.ServerArgs)}
found = {}
for name, options in launch.RECIPES.items():
    if options.keys() <= fields:
        args = launch.server_args(sys.argv[1], tp_size=2, **options)
        found[name] = [args.tp_size, args.ep_size, args.moe_a2a_backend, args.dp_size, args.moe_dense_tp_size]
print(json.dumps([launch.launch.seams.version(), found]))
"""


def test_recipes_resolve_to_tensor_parallelism(tiny_models: Path) -> None:
    model = tiny_model(tiny_models, TinyModel(expert_size=96, heads=16, dense_size=384))
    env = os.environ | IN_FRONT | {"EP2TP": "on", "HF_HUB_OFFLINE": "1"}
    child = subprocess.run([sys.executable, "-c", RESOLVE, str(model)], capture_output=True, text=True, env=env)
    assert child.returncode == 0, child.stderr[-3000:]
    version, found = json.loads(child.stdout.strip().splitlines()[-1])
    assert version == "0.5.17"
    assert len(found) > 15
    assert found == {name: [2, 1, "none", 1, None] for name in found}


@pytest.mark.engine
def test_a_recipe_runs_as_tp_with_the_tokens_of_one_rank(tiny_models: Path) -> None:
    """With sizes that do not divide, padded by ep2tp."""
    model = TinyModel("glm4_moe", heads=12, kv_heads=6, expert_size=75, dense_size=325)
    options = {"model_path": str(tiny_model(tiny_models, model)), "dtype": "float32"}

    def run(label: str, cores: str, mode: str, **more: object) -> EngineRun:
        environment = {**SGLANG.environment, **IN_FRONT, "SGLANG_CPU_OMP_THREADS_BIND": cores}  # one for each rank
        environment["SGLANG_CPU_SHIM_PAD"] = "ep2tp"
        found = run_engine(tiny_models, label, options | more, mode, replace(SGLANG, environment=environment))
        assert found.result is not None, found.log[-3000:]
        return found

    one_rank = run("oldest-one-rank", "0", "off")
    recipe = run("oldest-recipe", "0|1", "auto", tp_size=2, ep_size=2, moe_a2a_backend="deepep")
    assert one_rank.result is not None and recipe.result is not None
    assert recipe.result["tokens"] == one_rank.result["tokens"]
    for rank in recipe.result["collectives"]:
        assert rank["inside"] == {"all_reduce": rank["layers"] * SGLANG.all_reduces(model.layers)}
    report = "\n".join(recipe.ep2tp_lines)
    assert "rewrote this launch to tensor parallelism" in report
    assert "slices of whole 8-blocks" in report
