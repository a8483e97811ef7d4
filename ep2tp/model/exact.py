"""Sizes that do not divide into whole blocks and that an engine slices exactly all the same."""

from __future__ import annotations

from typing import Literal

from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import ClassName


def exact_in_engine(facts: ModelFacts, ranks: int, engine: Literal["vllm", "sglang"]) -> dict[ClassName, str]:
    """Classes that do not divide into whole blocks but that the engine slices exactly by the patch, and how."""
    known = facts.family.exact_in.get(engine, {})
    uneven = [c for c in facts.classes if c.size % (ranks * c.block) and c.size % ranks == 0]
    return {c.name: known[c.name] for c in uneven if c.name in known}
