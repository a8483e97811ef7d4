"""Records what a real vLLM on this CPU writes, for the tests of the detector: boot logs, and torch profiler traces.

    python -m tests.observe.record_vllm FOLDER [NAME ...]

Run from the repository's root with vLLM installed. Each engine takes about half a minute. ``tests/data/logs`` holds
what :mod:`tests.observe.trim` leaves of them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.launch import PROMPTS, run_logged
from ep2tp.demo.tiny import TinyModel
from tests.observe.recordings import main

MODEL = TinyModel(expert_size=72, shared_experts=1, dense_size=320)
LIMIT_S = 240


@dataclass(frozen=True)
class Recording:
    """One engine to start: keyword arguments of ``vllm.LLM``, the value of ``EP2TP``, and whether it is profiled."""

    engine: dict[str, Any] = field(default_factory=dict)
    ep2tp: str = "off"
    is_traced: bool = False


_TP2: dict[str, Any] = {"tensor_parallel_size": 2}
_EP: dict[str, Any] = {"enable_expert_parallel": True}
RECORDINGS = {
    "vllm-0.32.0-tp1": Recording(),
    "vllm-0.32.0-tp2": Recording(_TP2, is_traced=True),
    "vllm-0.32.0-tep2-crashes": Recording(_TP2 | _EP),
    "vllm-0.32.0-tep2-rewritten": Recording(_TP2 | _EP, "on", is_traced=True),
    "vllm-0.32.0-dep2-crashes": Recording({"data_parallel_size": 2} | _EP),
    "vllm-0.32.0-dp2-crashes": Recording({"data_parallel_size": 2}),
}


def record(folder: Path, name: str) -> int:
    """Run one engine; its output goes to ``FOLDER/NAME.log``, its traces to ``FOLDER/NAME.traces``."""
    recording = RECORDINGS[name]
    model = MODEL.write(folder / "model", "float32")
    engine = {"model": str(model), "dtype": "float32", **recording.engine}
    if recording.is_traced:
        traces = str(folder.resolve() / f"{name}.traces")
        engine["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": traces,
            "torch_profiler_with_stack": False,
        }
    environment = os.environ | CPU_ENVIRONMENT | {"EP2TP": recording.ep2tp}
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--engine", json.dumps(engine)]
    return run_logged(command, environment, folder / f"{name}.log", LIMIT_S)


def _generate(engine: dict[str, Any]) -> None:
    """Start the engine in this process, and generate; vLLM writes the log."""
    from vllm import LLM, SamplingParams

    if engine.get("data_parallel_size", 1) > 1:
        # One process offers no data parallelism; vLLM's own server class does.
        _serve(engine)
        return
    llm = LLM(enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, **engine)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    if "profiler_config" in engine:
        llm.start_profile()
    for prompt in PROMPTS[:2]:
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    if "profiler_config" in engine:
        llm.stop_profile()


def _serve(engine: dict[str, Any]) -> None:
    import asyncio

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def serve() -> None:
        arguments = AsyncEngineArgs(enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, **engine)
        llm = AsyncLLM.from_engine_args(arguments)
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
        async for _ in llm.generate({"prompt_token_ids": PROMPTS[0]}, sampling, "1"):
            pass

    asyncio.run(serve())


if __name__ == "__main__":
    main(RECORDINGS, record, _generate)
