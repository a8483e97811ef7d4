"""One vLLM engine, timed: ``ep_vs_tp_engine.py STEM``, started by ep_vs_tp.py.

Reads STEM.request.json, writes STEM.ready once the engine stands, waits for STEM.go, writes STEM.result.json.

A decode step's time is the steady time between tokens: of each request, from the last token that is skipped to the last
one, over the tokens between; the mean over the requests of a batch. Start-up and prefill do not enter.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any


class Worker:
    """A ``worker_extension_cls``: what each rank holds, and which experts it draws."""

    model_runner: Any
    vllm_config: Any

    def parameter_bytes(self) -> int:
        """Bytes of this rank's parameters."""
        model = self.model_runner.get_model()
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def draw_own_experts(self) -> None:
        """Seed simulated routing by data-parallel rank: vLLM 0.25.1 seeds all alike, and all draw the same experts."""
        import torch

        torch.manual_seed(self.vllm_config.parallel_config.data_parallel_rank)


async def measure(stem: str) -> dict[str, Any]:
    """Start the engine, wait for its turn, and time it."""
    import torch
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    request = json.loads(Path(f"{stem}.request.json").read_text(encoding="utf-8"))
    start, harness = time.monotonic(), os.getppid()
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
        "own_experts": True,
    }
    await engine.collective_rpc("draw_own_experts")
    Path(f"{stem}.ready").touch()
    while not Path(f"{stem}.go").exists():
        if os.getppid() != harness:  # it was killed: nobody else ends an engine, which holds its GPU memory
            engine.shutdown()
            sys.exit("the harness has ended")
        await asyncio.sleep(0.1)
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
        """Milliseconds between tokens at a batch: median, least and most over the repetitions."""
        skipped, steps = self.request["skipped"], self.request["steps"]
        await self._generate(batch, self.request["prompt"], 2 * skipped)  # warms up kernels and graphs of this size
        samples = []
        for _ in range(self.request["repeats"]):
            arrivals = await self._generate(batch, self.request["prompt"], steps)
            between = [(times[-1] - times[skipped]) / (steps - 1 - skipped) for times in arrivals]
            samples.append(statistics.mean(between) * 1e3)
        return _spread(samples)

    async def prefill(self, tokens: int) -> dict[str, Any]:
        """Milliseconds from sending a prompt to its first token."""
        samples = []
        for _ in range(self.request["repeats"] + 1):
            start = time.perf_counter()
            [[arrival]] = await self._generate(1, tokens, 1)
            samples.append((arrival - start) * 1e3)
        return _spread(samples[1:])

    async def _generate(self, batch: int, prompt: int, tokens: int) -> list[list[float]]:
        """When each token of each of ``batch`` requests of the same length arrived."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        prompts = [[self.chance.randrange(2, self.request["vocabulary"]) for _ in range(prompt)] for _ in range(batch)]
        return await asyncio.gather(*(self._one(ids, sampling, place) for place, ids in enumerate(prompts)))

    async def _one(self, ids: list[int], sampling: Any, place: int) -> list[float]:
        self.number += 1
        rank = {"data_parallel_rank": place % self.ranks} if self.ranks > 1 else {}
        arrivals: list[float] = []
        async for output in self.engine.generate({"prompt_token_ids": ids}, sampling, str(self.number), **rank):
            arrivals += [time.perf_counter()] * len(output.outputs[0].token_ids)
        assert len(arrivals) == sampling.max_tokens, "the engine stopped early"
        return arrivals


def _spread(samples: list[float]) -> dict[str, Any]:
    rounded = [round(sample, 4) for sample in samples]
    return {"ms": round(statistics.median(samples), 4), "least": min(rounded), "most": max(rounded), "samples": rounded}


if __name__ == "__main__":
    measured = asyncio.run(measure(sys.argv[1]))
    partial = Path(f"{sys.argv[1]}.result.partial")
    partial.write_text(json.dumps(measured), encoding="utf-8")
    partial.rename(f"{sys.argv[1]}.result.json")
