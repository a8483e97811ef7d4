"""Sizes that do not divide into whole blocks and that an engine slices exactly all the same."""

from __future__ import annotations

from math import gcd
from typing import Literal

from ep2tp.layout.split import refine
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import ClassName

FINEST_REFINED = 32
"""The finest block or group to which vLLM refines scales."""


def exact_in_engine(facts: ModelFacts, ranks: int, engine: Literal["vllm", "sglang"]) -> dict[ClassName, str]:
    """Classes that do not divide into whole blocks but that the engine slices exactly by the patch, and how."""
    known = facts.family.exact_in.get(engine, {})
    uneven = [c for c in facts.classes if c.size % (ranks * c.block) and c.size % ranks == 0]
    return {c.name: known[c.name] for c in uneven if c.name in known}


def refined_block(facts: ModelFacts, ranks: int) -> int | None:
    """The block to which ``Fp8MoEMethod`` of vLLM 0.32 and later refines routed experts that do not divide, or None."""
    routed = facts.tensor_class("routed")
    if routed is None or routed.size % (ranks * routed.block) == 0:
        return None
    if facts.quantization.method != "fp8" or routed.format_names != f"fp8_block{routed.block}":
        return None
    block = refine(routed.size, gcd(routed.block, facts.expert_hidden), ranks)
    return block if block is not None and block >= FINEST_REFINED else None
