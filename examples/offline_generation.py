"""Generate offline with an expert-parallel recipe, which ep2tp rewrites; write tokens and log-probabilities to a file.

    python examples/offline_generation.py MODEL --gpus 8 --output rewritten.jsonl
    EP2TP=off python examples/offline_generation.py MODEL --gpus 8 --stock --output stock.jsonl

MODEL is a folder or a hub id, or ``tiny`` for a small random DeepSeek-V3 that is written beside the output. What
generates does not name ep2tp: vLLM loads it as a plugin. compare_tokens.py compares two such files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PROMPTS = ["The capital of France is", "A binary search tree is", "Wer A sagt,"]
TINY_PROMPTS = [[3, 5, 7, 11, 13], [100, 200, 300], [42]]  # token ids: it has no tokenizer
TOKENS = 12


def main() -> None:
    """Generate greedily, one line a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--stock", action="store_true", help="plain tensor parallelism in place of the recipe")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()

    options: dict[str, Any] = {"tensor_parallel_size": given.gpus, "enable_expert_parallel": not given.stock}
    prompts: list[Any] = list(PROMPTS)
    if given.model == "tiny":
        options |= {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256, "enforce_eager": True}
        prompts = [{"prompt_token_ids": tokens} for tokens in TINY_PROMPTS]
        given.model = write_tiny(given.output.with_name("tiny-model"))
    with given.output.open("w", encoding="utf-8") as lines:
        for record in generate(given.model, prompts, options):
            lines.write(json.dumps(record) + "\n")


def write_tiny(folder: Path) -> str:
    """Experts of 75 values, which no two GPUs can share evenly: ep2tp pads them."""
    from ep2tp.demo.tiny import TinyModel

    return str(TinyModel("deepseek_v3", expert_size=75, shared_experts=2, dense_size=325).write(folder, "float32"))


def generate(model: str, prompts: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens of each prompt, and at each position the log-probabilities of the two likeliest tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, **options)
    has_text = not options.get("skip_tokenizer_init")
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2, ignore_eos=True, detokenize=has_text)
    found = []
    for output in llm.generate(prompts, sampling):
        [completion] = output.outputs
        likeliest = [{token: entry.logprob for token, entry in position.items()} for position in completion.logprobs]
        found.append({"prompt": output.prompt_token_ids, "tokens": list(completion.token_ids), "likeliest": likeliest})
    return found


if __name__ == "__main__":  # vLLM's workers import this file
    main()
