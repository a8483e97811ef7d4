"""Starts one SGLang engine, generates greedily, one prompt at a time, and saves tokens and log-probabilities.

    sglang_generate.py FOLDER RESULT.json [--engine JSON]

RESULT.json holds the ``tokens`` of each prompt, the ``logprobs`` of the 20 likeliest tokens of every step by token id,
what the server was resolved to, and timings.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

PROMPTS, STEPS, LIKELIEST = 6, 12, 20
OPTIONS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "disable_overlap_schedule": True,
    "skip_server_warmup": True,
    "skip_tokenizer_init": True,
    "mem_fraction_static": 0.7,  # of what is free at the start; the next line is what bounds the cache
    "max_total_tokens": 4096,
    "max_running_requests": 4,
    "context_length": 512,
    "random_seed": 0,
    "log_level": "info",
    "enforce_disable_flashinfer_allreduce_fusion": True,
}
RESOLVED = ("version", "tp_size", "ep_size", "moe_a2a_backend", "moe_runner_backend", "enable_dp_attention")


def main() -> None:
    """Run one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON")
    options = parser.parse_args()
    import sglang

    start = time.monotonic()
    engine = sglang.Engine(model_path=str(options.folder), **(OPTIONS | options.engine))
    started = time.monotonic()
    tokens, logprobs = _generate(engine)
    info = engine.get_server_info()
    result = {
        "tokens": tokens,
        "logprobs": logprobs,
        "resolved": {key: info.get(key) for key in RESOLVED},
        "start_seconds": round(started - start, 1),
        "generate_seconds": round(time.monotonic() - started, 1),
    }
    options.result.write_text(json.dumps(result))
    print("GENERATED", flush=True)
    engine.shutdown()


def prompts() -> list[list[int]]:
    """Token ids below 1024, from 3 to 88 of them a prompt; the same in every run."""
    chance = random.Random(1)
    return [[chance.randrange(2, 1024) for _ in range(3 + 17 * i)] for i in range(PROMPTS)]


def _generate(engine: Any) -> tuple[list[list[int]], list[list[dict[str, float]]]]:
    tokens, logprobs = [], []
    for prompt in prompts():
        [output] = engine.generate(
            input_ids=[prompt],
            sampling_params={"temperature": 0, "max_new_tokens": STEPS, "ignore_eos": True},
            return_logprob=True,
            top_logprobs_num=LIKELIEST,
        )
        tokens.append(list(output["output_ids"]))
        steps = output["meta_info"]["output_top_logprobs"]
        logprobs.append([{str(token): value for value, token, _ in step} for step in steps])
    return tokens, logprobs


if __name__ == "__main__":
    main()
