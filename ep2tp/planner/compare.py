"""Every plan of N GPUs for one model, each with its memory, divisibility, communication and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ep2tp.errors import ModelError
from ep2tp.model.facts import ModelFacts
from ep2tp.model.sharding import ShardPlan
from ep2tp.planner import communication as comm
from ep2tp.planner.communication import Collective
from ep2tp.planner.divisibility import ENGINES, Behaviour, blockers, stock_behaviour
from ep2tp.planner.engine_models import lacking
from ep2tp.planner.engine_plans import engines_padded, has_other_sizes, plan_in_vllm
from ep2tp.planner.gpus import Gpu
from ep2tp.planner.inventory import Inventory
from ep2tp.planner.layouts import Layout, layouts_for
from ep2tp.planner.links import Link
from ep2tp.planner.memory import Weights, cache_per_sequence, shard_plan, usable_bytes, weights_of
from ep2tp.planner.straggler import expert_load
from ep2tp.planner.timing import Setting, Step, decode_step, prefill_step


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        facts, inventory: the model.
        gpus, gpu, link: the machine.
        batches: sequences that decode at once, over all GPUs.
        context: tokens of each sequence.
        prompt: tokens of the prefill.
        revision: branch, tag or commit of a hub model; None for its default, and for a folder.
    """

    facts: ModelFacts
    inventory: Inventory
    gpus: int
    gpu: Gpu
    link: Link
    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 8192
    prompt: int = 2048
    revision: str | None = None


@dataclass(frozen=True)
class Assessment:
    """One plan, assessed.

    Attributes:
        layout: the plan.
        plan: how ep2tp slices and pads its MLP weights; None where it cannot.
        blockers: why it cannot run at all; empty where it can.
        stock: what engines without ep2tp do with sizes that do not divide.
        weights: bytes on the fullest GPU.
        cache: bytes of KV cache a sequence takes on a GPU that holds it.
        sequences: sequences of the context that fit beside the weights, over all GPUs; negative if not even the
            weights do.
        straggler: busiest rank over mean, in experts hit, by batch.
        collectives: those of one MoE layer, by batch.
        alternative: the same by rank-deduplicated all_to_all, for DEP.
        decode, prefill: times.
        padded_in: the engines in which ep2tp pads it, such as ``SGLang`` and ``vLLM before 0.32``.
        in_vllm: the same plan as vLLM 0.32 and later run it, where they hold less since nothing is padded.
        engine: the engine that this is true for, where there are two (SGLang's is that of vLLM before 0.32, too).
        lacking: what an engine's code for this model lacks that the plan needs.
    """

    layout: Layout
    plan: ShardPlan | None
    blockers: tuple[str, ...]
    stock: tuple[Behaviour, ...]
    weights: Weights
    cache: float
    sequences: int
    straggler: dict[int, float]
    collectives: dict[int, list[Collective]]
    alternative: dict[int, list[Collective]]
    decode: dict[int, Step]
    prefill: Step
    padded_in: tuple[str, ...] = ()
    in_vllm: Assessment | None = None
    engine: str = ""
    lacking: tuple[Behaviour, ...] = ()

    @property
    def name(self) -> str:
        """Its layout, and its engine where that matters: ``TP 8 vLLM``."""
        return f"{self.layout} {self.engine}".rstrip()

    @property
    def fits(self) -> bool:
        """Whether the weights and a sequence of the context (a rank, where attention is data parallel) fit."""
        return self.sequences >= self.layout.dp

    @property
    def divides(self) -> bool:
        """Whether everything is sliced into whole blocks without padding."""
        return not self.blockers and self.plan is not None and not self.plan.is_padded and not self.stock

    @property
    def runs(self) -> bool:
        """Whether it runs with ep2tp: it fits, what does not divide can be padded, and an engine takes it."""
        return self.fits and not self.blockers and self.plan is not None and self.is_served

    @property
    def is_served(self) -> bool:
        """Whether vLLM or SGLang runs it with this checkpoint; vLLM knows no TPxEP."""
        return any(self.is_served_by(engine) for engine in ENGINES)

    def is_served_by(self, engine: str) -> bool:
        """Whether that engine runs it with this checkpoint."""
        return (engine, self.layout.plan) != ("vLLM", "TPxEP") and self.obstacle(engine) is None

    def runs_in(self, engine: str) -> bool:
        """Whether it runs with ep2tp in that engine."""
        return self.runs and self.is_served_by(engine)

    def obstacle(self, engine: str) -> Behaviour | None:
        """What keeps an engine from running it; None where nothing does.

        ep2tp pads only launches that slice every expert, so what a plan with whole experts meets is the stock engine.
        """
        lacking = next((found for found in self.lacking if found.engine == engine), None)
        if lacking is not None or not self.layout.holds_whole_experts:
            return lacking
        return next((found for found in self.stock if found.engine == engine and found.outcome != "runs"), None)

    def holds(self, batch: int) -> bool:
        """Whether the KV cache holds ``batch`` sequences of the context at once."""
        return self.sequences >= batch


def assess_all(question: Question) -> list[Assessment]:
    """Assess every plan."""
    return [assess(question, layout) for layout in layouts_for(question.gpus)]


def as_run_by(engine: str, assessed: Sequence[Assessment]) -> list[Assessment]:
    """The plans with the figures that are true for an engine."""
    return [a.in_vllm or a if engine == "vLLM" else a for a in assessed]


def assess(question: Question, layout: Layout) -> Assessment:
    """Assess one plan; one that cannot run is assessed as if its weights could be sliced evenly.

    Where ep2tp pads it in one engine only, these are the padded figures, and those of the other are ``in_vllm``.
    """
    facts = question.facts
    problems = blockers(facts, layout)
    plan = exact = None
    try:
        plan = shard_plan(facts, layout)
        exact = plan_in_vllm(facts, layout, plan)
    except ModelError as error:
        problems.append(str(error))
    found = replace(_assess(question, layout, plan, problems), padded_in=engines_padded(layout, plan, exact))
    if exact is None or not has_other_sizes(exact):
        return found
    in_vllm = _assess(question, layout, exact, problems)
    padded_in = ("vLLM",) if exact.is_padded else ()
    return replace(found, in_vllm=replace(in_vllm, padded_in=padded_in, engine="vLLM"), engine="SGLang")


def _assess(question: Question, layout: Layout, plan: ShardPlan | None, problems: Sequence[str]) -> Assessment:
    facts, inventory = question.facts, question.inventory
    setting = _setting(question, layout, plan)
    sliced = setting.plan
    weights = weights_of(facts, inventory, layout, sliced)
    cache = cache_per_sequence(facts, inventory, layout, question.context)
    return Assessment(
        layout=layout,
        plan=plan,
        blockers=tuple(problems),
        stock=tuple(stock_behaviour(facts, layout)),
        lacking=tuple(lacking(facts, layout)),
        weights=weights,
        cache=cache,
        sequences=_sequences(usable_bytes(question.gpu.memory_gb) - weights.total, cache, layout),
        straggler={b: expert_load(b, facts.experts, facts.top_k, layout.ep).factor for b in question.batches},
        collectives={b: comm.moe_layer(b, facts.hidden, layout.stage_ranks, layout.dp) for b in question.batches},
        alternative=_alternative(question, layout),
        decode={b: decode_step(setting, b, question.context) for b in question.batches},
        prefill=prefill_step(setting, question.prompt),
    )


def decode_at(question: Question, assessed: Assessment, batch: int) -> Step:
    """A decode step of an assessed plan at a batch that was not asked for."""
    return decode_step(_setting(question, assessed.layout, assessed.plan), batch, question.context)


def _setting(question: Question, layout: Layout, plan: ShardPlan | None) -> Setting:
    plan = plan or ShardPlan(question.facts, layout.slices, {}, {}, {}, {}, {})
    return Setting(question.facts, question.inventory, plan, layout, question.gpu, question.link)


def _alternative(question: Question, layout: Layout) -> dict[int, list[Collective]]:
    if layout.dp == 1:
        return {}
    facts = question.facts
    size = (facts.hidden, layout.stage_ranks, facts.experts, facts.top_k)
    return {batch: comm.deduplicated_all_to_all(batch, *size) for batch in question.batches}


def _sequences(left: float, cache: float, layout: Layout) -> int:
    if left < 0:
        return -1
    return layout.dp * int(left // cache) if cache else layout.dp
