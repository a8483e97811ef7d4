"""One engine run in a process of its own: ``python -m ep2tp.demo.generate_vllm REQUEST.json RESULT.json``.

The request holds ``engine`` (keyword arguments of ``vllm.LLM``), ``prompts`` (token ids) and ``max_tokens``; the result
holds the greedy ``tokens`` of each prompt and, per rank, the ``collectives`` counted while they were generated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ep2tp.observe.collectives import EXTENSION


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """Start vLLM, generate greedily, one prompt at a time, and stop."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        worker_extension_cls=EXTENSION,
        **request["engine"],
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
    llm.collective_rpc("ep2tp_start_counting")
    tokens = [
        list(llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0].token_ids)
        for prompt in request["prompts"]
    ]
    return {"tokens": tokens, "collectives": llm.collective_rpc("ep2tp_stop_counting")}


if __name__ == "__main__":
    result = generate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
