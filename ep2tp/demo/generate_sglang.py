"""One engine run in a process of its own: ``python -m ep2tp.demo.generate_sglang REQUEST.json RESULT.json``.

Request and result are those of :mod:`ep2tp.demo.generate_vllm`; ``engine`` holds arguments of ``sglang.Engine``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ep2tp.observe.collectives import SGLANG_HOOK

OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "skip_server_warmup": True,
    "skip_tokenizer_init": True,
    "mem_fraction_static": 0.1,
    "max_total_tokens": 1024,
    "max_running_requests": 2,
    "context_length": 256,
    "log_level": "info",
}


def generate(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Start SGLang, generate greedily, one prompt at a time, and stop.

    Args:
        request: see above.
        folder: an existing folder for the counts of each rank.
    """
    import sglang

    passes = len(request["prompts"]) * request["max_tokens"] - 2  # of the model; the first one starts the counting
    hook = SGLANG_HOOK | {"config": {"folder": str(folder), "passes": passes}}
    engine = sglang.Engine(**OPTIONS, forward_hooks=[hook], **request["engine"])
    sampling = {"temperature": 0, "max_new_tokens": request["max_tokens"], "ignore_eos": True}
    outputs = [engine.generate(input_ids=[prompt], sampling_params=sampling) for prompt in request["prompts"]]
    engine.shutdown()
    counts = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    return {"tokens": [output[0]["output_ids"] for output in outputs], "collectives": counts}


if __name__ == "__main__":
    target = Path(sys.argv[2])
    counts = target.with_suffix(".collectives")
    counts.mkdir(exist_ok=True)
    result = generate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), counts)
    target.write_text(json.dumps(result), encoding="utf-8")
