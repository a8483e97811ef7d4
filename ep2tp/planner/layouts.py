"""The parallel plans that N GPUs allow, every factorisation of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Plan = Literal["TP", "TEP", "DEP", "TPxPP", "TPxEP"]


@dataclass(frozen=True)
class Layout:
    """One parallel plan.

    Attributes:
        plan: its kind.
        tp: tensor-parallel size as a launch gives it; for TPxEP, the slices of one expert.
        ep: groups of whole experts that the experts of a layer are spread over; 1 where every rank holds a slice of
            each.
        dp: data-parallel ranks of the attention.
        pp: pipeline stages.
    """

    plan: Plan
    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the whole launch."""
        return self.stage_ranks * self.pp

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage, which are also those of a MoE layer."""
        return self.attention_ranks * self.dp

    @property
    def attention_ranks(self) -> int:
        """Ranks over which attention, shared experts, dense MLPs and the vocabulary are sliced."""
        return self.tp * self.ep if self.plan == "TPxEP" else self.tp

    @property
    def slices(self) -> int:
        """Slices of one routed expert."""
        return 1 if self.plan in ("TEP", "DEP") else self.tp

    @property
    def holds_whole_experts(self) -> bool:
        """Whether some rank can have more experts to do than another."""
        return self.ep > 1

    def __str__(self) -> str:
        """Such as ``TP 4``, ``DEP 4`` or ``TPxPP 2x2``."""
        sizes = {"TPxPP": f"{self.tp}x{self.pp}", "TPxEP": f"{self.tp}x{self.ep}", "DEP": str(self.dp)}
        return f"{self.plan} {sizes.get(self.plan, self.tp)}"


def layouts_for(gpus: int) -> list[Layout]:
    """TP, TEP, DEP, then TPxPP (from few to many stages) and TPxEP (from few to many groups) of ``gpus`` GPUs."""
    if gpus == 1:
        return [Layout("TP")]
    pure = [Layout("TP", tp=gpus), Layout("TEP", tp=gpus, ep=gpus), Layout("DEP", ep=gpus, dp=gpus)]
    parts = [n for n in range(2, gpus + 1) if gpus % n == 0]
    stages = [Layout("TPxPP", tp=gpus // n, pp=n) for n in parts]
    groups = [Layout("TPxEP", tp=gpus // n, ep=n) for n in parts if n < gpus]
    return [*pure, *stages, *groups]


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage, as vLLM deals them out.

    Source: ``get_pp_indices``, vllm/distributed/utils.py, vLLM 0.25.1 to 0.33.0: what does not divide goes to the last
    stages but one.
    """
    sizes = [layers // stages] * stages
    for extra in range(layers % stages):
        sizes[-(extra + 2)] += 1
    return sizes
