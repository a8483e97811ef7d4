"""Starts one vLLM engine, generates greedily, one prompt at a time, and saves the logits of every step.

    generate.py FOLDER RESULT [--tp N] [--ep] [--shared-gpu] [--engine JSON] [--update FOLDER]

RESULT.json holds tokens, timings and what each rank looks like inside; RESULT.npz the logits, [prompt, step, token].
With --update the running engine is given another checkpoint's weights before it generates. One prompt at a time,
because the batch's size picks kernels: with requests that arrive together it would vary by run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS, STEPS = 12, 16


def main() -> None:
    """Run one engine."""
    options = _options()
    if options.shared_gpu:
        from host_staging import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
    import vllm

    vocabulary = json.loads((options.folder / "config.json").read_text())["vocab_size"]
    start = time.monotonic()
    llm = vllm.LLM(**_engine(options, vocabulary))
    started = time.monotonic()
    if options.update:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(options.update)})
    tokens, logits = _generate(llm, vllm.SamplingParams, vocabulary)
    result = {
        "vllm": vllm.__version__,
        "tokens": tokens,
        "ranks": llm.collective_rpc("describe_rank"),
        "start_seconds": round(started - start, 1),
        "generate_seconds": round(time.monotonic() - started, 1),
    }
    np.savez(options.result.with_suffix(".npz"), logits=logits)
    options.result.with_suffix(".json").write_text(json.dumps(result))
    print("GENERATED", flush=True)


def prompts(vocabulary: int) -> list[list[int]]:
    """Token ids, from 3 to 190 of them a prompt; the same in every run."""
    chance = random.Random(1)
    return [[chance.randrange(2, vocabulary) for _ in range(3 + 17 * i)] for i in range(PROMPTS)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", action="store_true")
    parser.add_argument("--shared-gpu", action="store_true")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--update", type=Path)
    return parser.parse_args()


def _engine(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": str(options.folder),
        "skip_tokenizer_init": True,
        "tensor_parallel_size": options.tp,
        "enable_expert_parallel": options.ep,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_logprobs": vocabulary,
        "logprobs_mode": "raw_logits",
        "gpu_memory_utilization": 0.04,  # checked against free memory alone, as the next line fixes the cache's size
        "kv_cache_memory_bytes": 1 << 28,
        "worker_extension_cls": "worker_probe.WorkerProbe",
        "seed": 0,
    }
    if options.tp > 1:
        arguments["distributed_executor_backend"] = "mp"
    if options.shared_gpu:
        arguments |= {"worker_cls": "shared_gpu.SharedGpuWorker", "disable_custom_all_reduce": True}
    return arguments | options.engine


def _generate(llm: Any, sampling: Any, vocabulary: int) -> tuple[list[list[int]], np.ndarray]:
    parameters = sampling(temperature=0.0, max_tokens=STEPS, logprobs=vocabulary, ignore_eos=True, detokenize=False)
    tokens = []
    logits = np.full((PROMPTS, STEPS, vocabulary), np.nan, dtype=np.float32)
    for i, prompt in enumerate(prompts(vocabulary)):
        [output] = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        completion = output.outputs[0]
        tokens.append(list(completion.token_ids))
        for step, found in enumerate(completion.logprobs):
            logits[i, step, list(found)] = [entry.logprob for entry in found.values()]
    return tokens, logits


if __name__ == "__main__":
    main()
