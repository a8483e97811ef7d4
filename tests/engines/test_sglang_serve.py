"""The real SGLang server with a published data-parallel-attention and expert-parallel recipe, by its command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from ep2tp.demo.engines import SGLANG
from ep2tp.demo.generate_sglang import OPTIONS
from ep2tp.demo.launch import PROMPTS
from tests.engines.conftest import ODD, OneRank, tiny_model
from tests.engines.serving import Server

pytestmark = pytest.mark.engine

RECIPE = ["--tp", "2", "--enable-dp-attention", "--dp-size", "2", "--moe-a2a-backend", "deepep", "--enable-eplb"]


def test_a_dep_recipe_is_served_as_tp(tiny_models: Path, one_rank: OneRank) -> None:
    model = tiny_model(tiny_models, ODD)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--dtype", "float32", *RECIPE]
    for name, value in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    server = Server(
        lambda port: {tiny_models / "sglang-serve.log": [*command, "--port", str(port)]},
        dict(SGLANG.environment) | {"EP2TP": "auto", "SGLANG_CPU_SHIM_PAD": "ep2tp"},
    )
    body = {
        "input_ids": PROMPTS[0],
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    }
    try:
        tokens = json.loads(server.ask_when_ready("/generate", body))["output_ids"]
    finally:
        text = server.stop()
    assert tokens == one_rank(ODD)[0]
    assert text.count("rewrote this launch to tensor parallelism") == 1
    assert re.search(r"routed \(moe_intermediate_size\)\s+75\s+80", text)
    assert " TP1]" in text and not re.search(r"TP\d EP\d|DP\d TP\d", text)
