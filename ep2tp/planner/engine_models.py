"""What an engine's own code for a model lacks, whatever the sizes: pipeline stages, data-parallel attention."""

from __future__ import annotations

from collections.abc import Iterator

from ep2tp.model.facts import ModelFacts
from ep2tp.planner.divisibility import Behaviour
from ep2tp.planner.layouts import Layout

SGLANG_WITHOUT_STAGES = frozenset(
    {
        "Ernie4_5_MoeForCausalLM",
        "KimiVLForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "LongcatFlashForCausalLM",
        "Qwen3NextForCausalLM",
        "Step3VLForConditionalGeneration",
        "Step3p7ForConditionalGeneration",
    }
)
"""Architectures whose ``forward`` takes no ``pp_proxy_tensors`` in SGLang 0.5.23."""

SGLANG_WITHOUT_DP_ATTENTION = frozenset({"Ernie4_5_MoeForCausalLM"})
"""Architectures whose attention SGLang 0.5.23 slices over all ranks, ``--enable-dp-attention`` or not."""


def lacking(facts: ModelFacts, layout: Layout) -> Iterator[Behaviour]:
    """What keeps an engine from running a plan of this model, apart from sizes that do not divide."""
    architectures = frozenset(facts.config.get("architectures") or ())
    if layout.pp > 1 and architectures & SGLANG_WITHOUT_STAGES:
        text = "Pipeline Parallel is not compatible with this model."
        yield Behaviour("SGLang", "0.5.23", "pipeline stages", "refuses", text, "model_executor/model_runner.py")
    if layout.dp > 1 and architectures & SGLANG_WITHOUT_DP_ATTENTION:
        text = "its attention is sliced over all ranks"
        yield Behaviour("SGLang", "0.5.23", "data-parallel attention", "refuses", text, "models/ernie4.py")
