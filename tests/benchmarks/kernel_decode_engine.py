"""One vLLM engine, timed in turns: ``kernel_decode_engine.py STEM``, started by kernel_decode_step.py.

Reads STEM.request.json, writes STEM.ready once the engine stands, and for each STEM.turn-N.go the decode times of every
batch to STEM.turn-N.json. For STEM.profile.go it generates at every batch under torch's profiler, and writes what the
GPU did in a step to STEM.profile.json. STEM.stop ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ep_vs_tp_engine import Timer
from gpu_time import gpu_time

PROFILED = 64


async def serve(stem: str) -> None:
    """Start the engine and take turns."""
    import torch
    import vllm
    from vllm.config.profiler import ProfilerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    request = json.loads(Path(f"{stem}.request.json").read_text(encoding="utf-8"))
    start, harness = time.monotonic(), os.getppid()
    profiler = ProfilerConfig(**request["engine"].pop("profiler_config"))
    request["traces"] = profiler.torch_profiler_dir
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(profiler_config=profiler, **request["engine"]))
    timer = Timer(engine, request, 1)
    for batch in request["batches"]:
        await timer._generate(batch, request["prompt"], 16)  # compiles what is left to compile
    facts = {"vllm": vllm.__version__, "torch": torch.__version__, "start_seconds": round(time.monotonic() - start, 1)}
    _write(f"{stem}.ready", facts)
    turn = 0
    while not Path(f"{stem}.stop").exists() and os.getppid() == harness:  # killed, it says nothing
        if Path(f"{stem}.turn-{turn}.go").exists():
            _write(f"{stem}.turn-{turn}.json", {str(b): (await timer.decode(b))["ms"] for b in request["batches"]})
            turn += 1
        if Path(f"{stem}.profile.go").exists() and not Path(f"{stem}.profile.json").exists():
            _write(f"{stem}.profile.json", {str(b): await profile(engine, timer, b) for b in request["batches"]})
        await asyncio.sleep(0.05)
    engine.shutdown()


async def profile(engine: Any, timer: Timer, batch: int) -> dict[str, Any]:
    """What the GPU does in a step, mean over a generation of up to ``PROFILED`` tokens; its prompts are part of it."""
    folder = Path(timer.request["traces"])
    before = set(folder.iterdir())
    steps = min(PROFILED, timer.request["steps"])
    await engine.start_profile()
    await timer._generate(batch, timer.request["prompt"], steps)
    await engine.stop_profile()
    traces = [path for path in sorted(set(folder.iterdir()) - before) if ".json" in path.name]
    found = [gpu_time(path, steps) for path in traces]
    return max(found, key=lambda one: one["busy_ms"])  # the other is the process that schedules


def _write(path: str, value: Any) -> None:
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
