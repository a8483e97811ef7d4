"""Reshard a model for N ranks, prove the result, and serve it with stock vLLM: no plugin runs on the serving machine.

    python examples/reshard_and_serve.py MODEL OUT --tp 2 [arguments of vLLM's server, such as --port 8000]

MODEL is a folder or a hub id, or ``tiny`` for a small random DeepSeek-V3 that this writes beside OUT: 75-wide experts,
which do not divide by 2. Where nothing needs padding, MODEL itself is served.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import ep2tp
from ep2tp.demo.tiny import TinyModel


def main() -> None:
    """Reshard, verify, and become vLLM's server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, required=True)
    given, for_vllm = parser.parse_known_args()

    model = given.model
    if model == "tiny":
        tiny = TinyModel("deepseek_v3", expert_size=75, shared_experts=2, dense_size=325)
        model = str(tiny.write(given.out.with_name(f"{given.out.name}-source"), "float32"))
    result = ep2tp.reshard(model, given.out, tp=given.tp)
    if result.status == "unneeded":
        print(f"{model} divides over {given.tp} ranks as it is", flush=True)
    else:
        found = ep2tp.verify(given.out, model)
        print(f"{given.out}: {found.tensors} tensors equal {model} bit for bit", flush=True)
        model = str(given.out)
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    without_plugins = os.environ | {"VLLM_PLUGINS": ""}
    os.execve(sys.executable, [*server, "--tensor-parallel-size", str(given.tp), *for_vllm], without_plugins)


if __name__ == "__main__":
    main()
