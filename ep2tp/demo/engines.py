"""The engines that the demo and the tests run on this CPU: how each is started, and what its log looks like."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# vLLM on a small CPU: 1 GiB of KV cache, no thread pinning, one thread a rank.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    **_ONE_THREAD,
}


@dataclass(frozen=True)
class DemoEngine:
    """One engine.

    Attributes:
        title: its name for a person.
        module: what runs it in a process of its own.
        environment: variables that it needs on a small CPU.
        failures: what tells most about a failure, best first: an engine's own summary names no cause.
        model_argument: what it calls the model's folder.
        report: what ep2tp wrote to its log, in lines without the engine's prefixes.
        tensor_parallel: arguments of a tensor-parallel launch over so many ranks.
        recipe: arguments of an expert-parallel launch over so many ranks.
        counted: the part of a model whose collectives are counted.
        all_reduces: how many it makes with tensor parallelism, in a model of so many layers.
    """

    title: str
    module: str
    environment: Mapping[str, str]
    failures: tuple[str, ...]
    model_argument: str
    report: Callable[[str], list[str]]
    tensor_parallel: Callable[[int], dict[str, Any]]
    recipe: Callable[[int], dict[str, Any]]
    counted: str
    all_reduces: Callable[[int], int]

    def flags_of(self, options: Mapping[str, Any]) -> str:
        """Arguments as a person types them."""
        words = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in options.items()
        ]
        return " ".join(words)


def _vllm_report(log: str) -> list[str]:
    return re.findall(r"INFO .*\[plugin\.py:\d+\] (.*)", log)


def _sglang_report(log: str) -> list[str]:
    """SGLang puts its prefix before the first line of a message only."""
    found = re.search(r"^\[\d{4}-[^]]*\] (ep2tp \d.*(?:\n(?!\[\d{4}-).*)*)", log, re.MULTILINE)
    return found.group(1).splitlines() if found else []


VLLM = DemoEngine(
    "vLLM",
    "ep2tp.demo.generate_vllm",
    CPU_ENVIRONMENT,
    (
        r"Segfault encountered",  # printed by vLLM's CPU kernels
        r"Worker proc .* died unexpectedly \(exit code: -?\d+\)",
        r"\bassert .*",
        r"\w+Error: (?!Engine core|Tokenizer).*",
        r"\w+Error: .*",
    ),
    "model",
    _vllm_report,
    lambda ranks: {"tensor_parallel_size": ranks},
    lambda ranks: {"tensor_parallel_size": ranks, "enable_expert_parallel": True},
    "MoE layer",
    lambda layers: 1,
)
SGLANG = DemoEngine(
    "SGLang",
    "ep2tp.demo.generate_sglang",
    _ONE_THREAD | {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"},  # one core a rank
    (r"\w+Error: .*DeepEP.*", r"\w+Error: .*"),
    "model_path",
    _sglang_report,
    lambda ranks: {"tp_size": ranks},
    lambda ranks: {"tp_size": ranks, "ep_size": ranks, "moe_a2a_backend": "deepep"},
    "pass of the decoder",
    lambda layers: 1 + 2 * layers,  # the embedding; attention and MLP of each layer
)
ENGINES = {"vllm": VLLM, "sglang": SGLANG}
