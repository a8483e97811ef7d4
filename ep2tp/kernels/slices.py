"""The shapes of one rank's routed experts for which kernels are tuned, from a model's config."""

from __future__ import annotations

from dataclasses import dataclass

from ep2tp.errors import ModelError
from ep2tp.kernels.configs import Key
from ep2tp.kernels.operands import UNIT, WeightFormat
from ep2tp.layout.split import refine
from ep2tp.model.facts import ModelFacts
from ep2tp.model.sharding import plan_shards

_FORMATS = {
    "bf16": WeightFormat("bf16"),
    "fp8_channel": WeightFormat("fp8", (1, 0)),
    "fp8_tensor": WeightFormat("fp8"),
}


@dataclass(frozen=True)
class Slice:
    """One rank's routed experts.

    Attributes:
        experts: E, with shared experts where an engine fuses them into the routed ones.
        hidden: K.
        size: I, values of the intermediate dimension that a rank holds, padding included.
        top_k: experts of a token.
        format: how they are stored.
    """

    experts: int
    hidden: int
    size: int
    top_k: int
    format: WeightFormat

    @property
    def key(self) -> Key:
        """By which a table is looked up."""
        return self.experts, self.hidden, self.size, self.top_k

    def __str__(self) -> str:
        return f"E={self.experts} K={self.hidden} I={self.size} top {self.top_k} {self.format}"


def slice_of(facts: ModelFacts, ranks: int, *, refines: bool = False, fused_shared: int = 0) -> Slice:
    """One rank's slice.

    Args:
        facts: the model.
        ranks: tensor-parallel size.
        refines: whether the engine repeats FP8 block scales on a finer grid instead of padding (vLLM since 0.32).
        fused_shared: shared experts that the engine appends to the routed ones (SGLang: DeepSeek-V3's one).

    Raises:
        ModelError: the experts are stored in a format that the tuner has no kernel for, or the slice is too thin.
    """
    routed = facts.tensor_class("routed")
    if routed is None or len(routed.formats) != 1 or routed.formats[0] is None:
        names = routed.format_names if routed else "no routed experts"
        raise ModelError(f"{facts.source}: routed experts stored as {names}; tune takes one format for all layers")
    name, block = routed.formats[0].name, routed.block
    fine = refine(routed.size, block, ranks) if refines and name.startswith("fp8_block") else None
    if fine is not None and fine < block and routed.size % (ranks * block):
        size, block = routed.size // ranks, fine
    else:
        size = plan_shards(facts, ranks).splits["routed"].per_rank
    stored = WeightFormat("fp8", (block, block)) if name == f"fp8_block{routed.block}" else _FORMATS.get(name)
    if stored is None:
        raise ModelError(f"{facts.source}: routed experts are stored as {name}; tune takes BF16 and FP8")
    if size % UNIT:
        raise ModelError(
            f"{facts.source}: {size} values a rank; ep2tp's kernel takes multiples of {UNIT}; use another --tp"
        )
    return Slice(facts.experts + fused_shared, facts.expert_hidden, size, facts.top_k + fused_shared, stored)
