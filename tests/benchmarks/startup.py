"""What ep2tp adds to vLLM's start on this machine: ``startup.py [REPETITIONS]``.

Starts a tiny DeepSeek-V3 at TP=2, in turn: no plugin loaded at all, ep2tp switched off, on with nothing to change,
and an expert-parallel command line that it rewrites, whose experts it pads. A line for each: seconds until ``LLM`` is
there, imports included, median and spread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.tiny import TinyModel

_START = """
import json, sys, time
begin = time.monotonic()
from vllm import LLM
llm = LLM(**json.loads(sys.argv[1]))
print("SECONDS", time.monotonic() - begin)
"""
_EP = {"enable_expert_parallel": True}
CASES = {
    "no plugin": ({"VLLM_PLUGINS": ""}, {}, 64),
    "EP2TP=off": ({"EP2TP": "off"}, {}, 64),
    "EP2TP=on, nothing to change": ({"EP2TP": "on"}, {}, 64),
    "EP2TP=on, rewritten and padded": ({"EP2TP": "on"}, _EP, 75),
}


def start(model: Path, environment: dict[str, str], arguments: dict[str, bool]) -> float:
    """Seconds of one start."""
    engine = {"model": str(model), "tensor_parallel_size": 2, "enforce_eager": True, "skip_tokenizer_init": True}
    engine |= {"max_model_len": 256, "dtype": "bfloat16", **arguments}
    command = [sys.executable, "-c", _START, json.dumps(engine)]
    done = subprocess.run(command, env=os.environ | CPU_ENVIRONMENT | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    [line] = [text for text in done.stdout.splitlines() if text.startswith("SECONDS")]
    return float(line.split()[1])


def main() -> None:
    """Run all cases in turn, as often as asked."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        models = {size: TinyModel(expert_size=size).write(Path(folder) / str(size)) for size in (64, 75)}
        for _ in range(repetitions):
            for name, (environment, arguments, size) in CASES.items():
                found[name].append(start(models[size], environment, arguments))
    print(time.strftime("%Y-%m-%d"), "processors:", os.cpu_count())
    for name, samples in found.items():
        print(f"{name:32} {statistics.median(samples):6.1f} s ({min(samples):.1f} to {max(samples):.1f})")


if __name__ == "__main__":
    main()
