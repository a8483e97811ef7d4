"""Records what a real SGLang on this CPU writes, for the tests of the detector.

    python tests/observe/record_sglang.py FOLDER [NAME ...]

Needs an SGLang that runs on a CPU (0.5.23 was used) and this repository on ``PYTHONPATH``. Stock expert parallelism
computes nothing on a CPU, but a launch with it logs all that it does on a GPU before its first forward pass.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ep2tp.demo.launch import run_logged
from ep2tp.demo.tiny import TinyModel
from tests.observe.recordings import main

MODEL = TinyModel("glm4_moe", heads=12, kv_heads=6, expert_size=64, dense_size=256)
LIMIT_S = 120
_TP2: dict[str, Any] = {"tp_size": 2}
RECORDINGS: dict[str, tuple[dict[str, Any], str]] = {
    "sglang-0.5.23-tp1": ({}, "off"),
    "sglang-0.5.23-tp2": (_TP2, "off"),
    "sglang-0.5.23-tep2-crashes": (_TP2 | {"ep_size": 2}, "off"),
    "sglang-0.5.23-dep2-crashes": (_TP2 | {"moe_a2a_backend": "deepep"}, "off"),
    "sglang-0.5.23-tep2-rewritten": (_TP2 | {"ep_size": 2}, "on"),
}
_CPU = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.1,
    "max_total_tokens": 1024,
    "max_running_requests": 2,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "context_length": 256,
    "skip_server_warmup": True,
    "skip_tokenizer_init": True,
    "log_level": "info",
}


def record(folder: Path, name: str) -> int:
    """Run one engine; its output goes to ``FOLDER/NAME.log``."""
    model = MODEL.write(folder / "sglang-model", "float32")
    arguments, mode = RECORDINGS[name]
    engine = {"model_path": str(model), **_CPU, **arguments}
    environment = os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1" if engine.get("tp_size") == 2 else "0",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_PLUGINS": "none" if mode == "off" else "ep2tp",
        "EP2TP": mode,
    }
    command = [sys.executable, __file__, "--engine", json.dumps(engine)]
    return run_logged(command, environment, folder / f"{name}.log", LIMIT_S)


def _generate(arguments: dict[str, Any]) -> None:
    import sglang

    engine = sglang.Engine(**arguments)
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    print(engine.generate(input_ids=[[3, 5, 7, 11, 13]], sampling_params=sampling), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main(RECORDINGS, record, _generate)
