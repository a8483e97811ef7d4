"""What real engines wrote, and the plan that each of them ran.

``tests/data/logs`` holds what :mod:`tests.observe.trim` left of it. CPU: vLLM 0.32.0 (:mod:`tests.observe.record_vllm`)
and SGLang 0.5.23 (:mod:`tests.observe.record_sglang`). GPU: two H100s (:mod:`tests.gpu.record_logs`). A file that is
named here and missing is a recording that has not been made yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LOGS = Path(__file__).parents[1] / "data" / "logs"

# Name: plan, engine, confidence.
RECORDINGS = {
    "vllm-0.32.0-tp1.log": ("TP", "vllm", "high"),
    "vllm-0.32.0-tp2.log": ("TP", "vllm", "high"),
    "vllm-0.32.0-tep2-crashes.log": ("TEP", "vllm", "high"),
    "vllm-0.32.0-tep2-rewritten.log": ("TP", "vllm", "high"),
    "vllm-0.32.0-dep2-crashes.log": ("DEP", "vllm", "high"),
    "vllm-0.32.0-dp2-crashes.log": ("mixed", "vllm", "high"),
    "vllm-0.32.0-tp2.trace.json.gz": ("TP", "vllm", "high"),
    "vllm-0.32.0-tep2-rewritten.trace.json.gz": ("TP", "vllm", "high"),
    "sglang-0.5.23-tp1.log": ("TP", "sglang", "high"),
    "sglang-0.5.23-tp2.log": ("TP", "sglang", "high"),
    "sglang-0.5.23-tep2-crashes.log": ("TEP", "sglang", "high"),
    "sglang-0.5.23-dep2-crashes.log": ("DEP", "sglang", "high"),
    "sglang-0.5.23-tep2-rewritten.log": ("TP", "sglang", "high"),
    "vllm-0.25.1-gpu-tp2.log": ("TP", "vllm", "high"),
    "vllm-0.25.1-gpu-tep2.log": ("TEP", "vllm", "high"),
    "vllm-0.25.1-gpu-dep2.log": ("DEP", "vllm", "high"),
    "vllm-0.25.1-gpu-tep2-rewritten.log": ("TP", "vllm", "high"),
    "vllm-0.25.1-gpu-tp2.trace.json.gz": ("TP", "vllm", "high"),
    "vllm-0.25.1-gpu-tep2.trace.json.gz": ("TEP", "vllm", "medium"),
    "vllm-0.25.1-gpu-tep2-rewritten.trace.json.gz": ("TP", "vllm", "high"),
    "vllm-0.25.1-gpu-dep2.trace.json.gz": ("DEP", "vllm", "high"),
    "sglang-0.5.17-gpu-tp2.log": ("TP", "sglang", "high"),
    "sglang-0.5.17-gpu-dep2-rewritten.log": ("TP", "sglang", "high"),  # tests/gpu/test_sglang.py, fp8_ep2tp_deepep
    "sglang-0.5.17-gpu-tep2.log": ("TEP", "sglang", "high"),
    "sglang-0.5.17-gpu-tp2.trace.json.gz": ("TP", "sglang", "medium"),
    "sglang-0.5.17-gpu-tep2.trace.json.gz": ("TEP", "sglang", "medium"),
}


def recorded() -> list[str]:
    """The recordings that are there."""
    return [name for name in RECORDINGS if (LOGS / name).exists()]


def main(
    names: Iterable[str], record: Callable[[Path, str], int], generate: Callable[[dict[str, Any]], object]
) -> None:
    """A recorder's command line: a folder, and which of ``names`` to record there (all).

    Args:
        names: what can be recorded.
        record: starts an engine in a process of its own, by this command line with ``--engine``, and logs it.
        generate: is what happens there.
    """
    if sys.argv[1] == "--engine":
        generate(json.loads(sys.argv[2]))
        return
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or names:
        print(f"{name}: exit status {record(folder, name)}", flush=True)
