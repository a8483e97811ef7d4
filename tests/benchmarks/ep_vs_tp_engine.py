"""One vLLM engine, timed: ``ep_vs_tp_engine.py REQUEST.json RESULT.json``, started by ep_vs_tp.py.

A decode step's time is the difference of two generations of the same requests, one longer than the other, over the
difference of their lengths: start-up, prefill and the way to and from the engine cancel out.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any


class ParameterBytes:
    """A ``worker_extension_cls``: what each rank holds."""

    model_runner: Any

    def parameter_bytes(self) -> int:
        """Bytes of this rank's parameters."""
        model = self.model_runner.get_model()
        return sum(p.numel() * p.element_size() for p in model.parameters())


async def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and time it."""
    import torch
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    start = time.monotonic()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**request["engine"]))
    parallel = engine.vllm_config.parallel_config
    result: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "enable_expert_parallel": parallel.enable_expert_parallel,
        "start_seconds": round(time.monotonic() - start, 1),
        "parameter_bytes": await engine.collective_rpc("parameter_bytes"),
    }
    timer = Timer(engine, request, parallel.data_parallel_size)
    result["decode"] = {str(batch): await timer.decode(batch) for batch in request["batches"]}
    result["prefill"] = await timer.prefill(request["prefill"])
    engine.shutdown()
    return result


class Timer:
    """Times generations of random prompts, dealt out evenly over data-parallel ranks."""

    def __init__(self, engine: Any, request: dict[str, Any], data_parallel: int) -> None:
        self.engine, self.request, self.ranks = engine, request, data_parallel
        self.chance, self.number = random.Random(0), 0

    async def decode(self, batch: int) -> dict[str, Any]:
        """Milliseconds of a decode step at a batch: median, least and most over the repetitions."""
        short, long = self.request["steps"]
        await self._generate(batch, self.request["prompt"], short)  # warms up kernels and graphs of this size
        samples = []
        for _ in range(self.request["repeats"]):
            few = await self._generate(batch, self.request["prompt"], short)
            many = await self._generate(batch, self.request["prompt"], long)
            samples.append((many - few) / (long - short) * 1e3)
        return _spread(samples)

    async def prefill(self, tokens: int) -> dict[str, Any]:
        """Milliseconds from sending a prompt to its first token."""
        await self._generate(1, tokens, 1)
        return _spread([await self._generate(1, tokens, 1) * 1e3 for _ in range(self.request["repeats"])])

    async def _generate(self, batch: int, prompt: int, tokens: int) -> float:
        """Seconds until ``batch`` requests of the same length are done."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompts = [[self.chance.randrange(2, self.request["vocabulary"]) for _ in range(prompt)] for _ in range(batch)]
        start = time.perf_counter()
        await asyncio.gather(*(self._one(ids, sampling, place) for place, ids in enumerate(prompts)))
        return time.perf_counter() - start

    async def _one(self, ids: list[int], sampling: Any, place: int) -> None:
        self.number += 1
        rank = {"data_parallel_rank": place % self.ranks} if self.ranks > 1 else {}
        async for output in self.engine.generate({"prompt_token_ids": ids}, sampling, str(self.number), **rank):
            found = output.outputs[0].token_ids
        assert len(found) == sampling.max_tokens, "the engine stopped early"


def _spread(samples: list[float]) -> dict[str, Any]:
    rounded = [round(sample, 4) for sample in samples]
    return {"ms": round(statistics.median(samples), 4), "least": min(rounded), "most": max(rounded), "samples": rounded}


if __name__ == "__main__":
    measured = asyncio.run(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text(json.dumps(measured), encoding="utf-8")
