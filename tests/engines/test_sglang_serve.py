"""The real SGLang server with a published data-parallel-attention and expert-parallel recipe, by its command line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from ep2tp.demo.engines import SGLANG
from ep2tp.demo.generate_sglang import OPTIONS
from ep2tp.demo.launch import PROMPTS, run_engine
from ep2tp.demo.tiny import TinyModel
from tests.engines.conftest import tiny_model

pytestmark = pytest.mark.engine

MODEL = TinyModel(expert_size=75, shared_experts=2, dense_size=325)
RECIPE = ["--tp", "2", "--enable-dp-attention", "--dp-size", "2", "--moe-a2a-backend", "deepep", "--enable-eplb"]


def ask(url: str, body: dict[str, object]) -> list[int]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(json.loads(answer.read())["output_ids"])


def ask_when_ready(url: str, body: dict[str, object], server: subprocess.Popen[bytes], log: Path) -> list[int]:
    for _ in range(240):
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            return ask(url, body)
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def test_a_dep_recipe_is_served_as_tp(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_models, MODEL)
    reference = run_engine(
        tiny_models, "sglang-serve-reference", {"model_path": str(model), "dtype": "float32"}, "off", SGLANG, 6
    )
    assert reference.result is not None, reference.log[-3000:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--dtype", "float32", *RECIPE]
    for name, value in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    env = os.environ | dict(SGLANG.environment) | {"EP2TP": "auto", "SGLANG_CPU_SHIM_PAD": "ep2tp"}
    log = tiny_models / "sglang-serve.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*command, "--port", str(port)], stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    body = {
        "input_ids": PROMPTS[0],
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
    }
    try:
        tokens = ask_when_ready(f"http://127.0.0.1:{port}/generate", body, server, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    text = log.read_text(errors="replace")
    assert tokens == reference.result["tokens"][0]
    assert text.count("rewrote this launch to tensor parallelism") == 1
    assert re.search(r"routed \(moe_intermediate_size\)\s+75\s+80", text)
    assert " TP1]" in text and not re.search(r"TP\d EP\d|DP\d TP\d", text)
