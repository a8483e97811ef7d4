"""How long one step takes at least: bytes a GPU must read, arithmetic it must do, collectives it must wait for.

A bound, computed: kernels reach neither the whole bandwidth nor the whole arithmetic, launches and attention's own
arithmetic are not counted, and no communication is hidden behind computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ep2tp.model.facts import ModelFacts
from ep2tp.model.sharding import ShardPlan
from ep2tp.planner import communication as comm
from ep2tp.planner.communication import ACTIVATION_BYTES, Collective
from ep2tp.planner.gpus import Gpu
from ep2tp.planner.inventory import Inventory
from ep2tp.planner.layouts import Layout
from ep2tp.planner.links import Link
from ep2tp.planner.memory import Stage, growth, head_bytes, stage_weights, stages_of
from ep2tp.planner.straggler import expert_load, token_load


@dataclass(frozen=True)
class Step:
    """Milliseconds of one forward pass of a batch.

    Attributes:
        weights: reading the weights that the batch touches (or the arithmetic on them, where that takes longer), as
            if all ranks had equally many experts to do.
        straggler: the further wait for the rank with most experts to do.
        cache: reading the KV cache, and reading and writing the state of linear attention.
        communication: all collectives.
    """

    weights: float
    straggler: float
    cache: float
    communication: float

    @property
    def total(self) -> float:
        """Milliseconds in all."""
        return self.weights + self.straggler + self.cache + self.communication


@dataclass(frozen=True)
class Setting:
    """What a step runs on."""

    facts: ModelFacts
    inventory: Inventory
    plan: ShardPlan
    layout: Layout
    gpu: Gpu
    link: Link


def decode_step(setting: Setting, batch: int, context: int) -> Step:
    """One token for each of ``batch`` sequences with ``context`` tokens of KV cache each.

    With pipeline stages the batch is dealt out as one microbatch a stage, which all are in flight at once: between two
    tokens of a sequence, the slowest stage runs once for every microbatch.
    """
    stages = setting.layout.pp
    return _scaled(_slowest(setting, ceil(batch / stages), ceil(batch / stages), context), stages)


def prefill_step(setting: Setting, tokens: int) -> Step:
    """One prompt of ``tokens`` tokens, up to its first new token; stages run one after the other.

    Under data-parallel attention one rank does the attention of the whole prompt, and all share its experts.
    """
    steps = [_stage_step(setting, stage, tokens, 1, 0) for stage in _stages(setting)]
    return Step(*(sum(getattr(step, part) for step in steps) for part in Step.__dataclass_fields__))


def step_collectives(setting: Setting, stage: Stage, tokens: int, sequences: int) -> list[tuple[int, Collective]]:
    """(times, collective) of one pass of ``sequences`` sequences with ``tokens`` new tokens in all through a stage.

    Logits are those of one token a sequence, in prefill, too (vLLM 0.32.0, v1/worker/gpu_model_runner.py:
    ``hidden_states[logits_indices]``; SGLang 0.5.23, layers/logits_processor.py: ``pruned_states``).
    """
    facts, layout = setting.facts, setting.layout
    payload, ranks = tokens * facts.hidden * ACTIVATION_BYTES, layout.attention_ranks
    found = [(stage.moe, c) for c in comm.moe_layer(tokens, facts.hidden, layout.stage_ranks, layout.dp)]
    if ranks > 1:
        attentions = stage.layers * setting.inventory.layers.attentions
        found.append((attentions, comm.all_reduce(payload, ranks, "sum of the heads' outputs, BF16")))
        alone = stage.dense if setting.inventory.layers.attentions == 1 else stage.dense // 2
        found.append((alone, comm.all_reduce(payload, ranks, "sum of a dense MLP's output, BF16")))
        if stage.has_embedding:
            found.append((1, comm.all_reduce(payload, ranks, "embedding of a sliced vocabulary, BF16")))
        if stage.has_head:
            logits = sequences * (facts.vocabulary or 0) * ACTIVATION_BYTES
            found.append((1, comm.all_gather(logits, ranks, "logits, BF16")))
    if layout.pp > 1 and not stage.has_head:
        found.append((1, Collective("send", 2, payload / ranks, "hidden states for the next stage, BF16")))
    return [(times, collective) for times, collective in found if times]


def _stages(setting: Setting) -> list[Stage]:
    return stages_of(setting.facts, setting.inventory, setting.layout.pp)


def _slowest(setting: Setting, tokens: int, sequences: int, context: int) -> Step:
    return max(
        (_stage_step(setting, s, tokens, sequences, context) for s in _stages(setting)), key=lambda step: step.total
    )


def _scaled(step: Step, times: int) -> Step:
    return Step(*(times * getattr(step, part) for part in Step.__dataclass_fields__))


def _stage_step(setting: Setting, stage: Stage, tokens: int, sequences: int, context: int) -> Step:
    """``sequences`` sequences with ``tokens`` new tokens in all."""
    mean, busiest = _experts_ms(setting, stage, tokens)
    rows = ceil(sequences / setting.layout.dp)  # sequences of the fullest data-parallel rank
    here = rows * tokens // sequences
    rest = _dense_ms(setting, stage, here) + _head_ms(setting, stage, rows)
    attention, ranks = setting.inventory.attention, setting.layout.attention_ranks
    read = here * attention.read_of(context) / attention.ranks_of_kv(ranks)
    cache = stage.layers * (read + 2 * rows * attention.state_on_rank(ranks))  # a state is read and written
    return Step(
        weights=mean + rest,
        straggler=busiest - mean,
        cache=cache / setting.gpu.bandwidth * 1e3,
        communication=sum(
            times * setting.link.us(c.kind, c.sent, c.ranks) / 1e3
            for times, c in step_collectives(setting, stage, tokens, sequences)
        ),
    )


def _experts_ms(setting: Setting, stage: Stage, tokens: int) -> tuple[float, float]:
    """Milliseconds of the routed experts on the mean and on the busiest rank."""
    facts, layout = setting.facts, setting.layout
    size = setting.inventory.expert * growth(setting.plan, "routed") / layout.slices
    hits = expert_load(tokens, facts.experts, facts.top_k, layout.ep)
    pairs = token_load(tokens, facts.experts, facts.top_k, layout.ep)
    routed = facts.tensor_class("routed")
    values = 3 * facts.expert_hidden * (routed.size if routed else 0) / layout.slices
    times = [
        max(experts * size / setting.gpu.bandwidth, 2 * values * rows / _arithmetic(setting))
        for experts, rows in ((hits.mean, pairs.mean), (hits.busiest, pairs.busiest))
    ]
    return stage.moe * times[0] * 1e3, stage.moe * times[1] * 1e3


def _dense_ms(setting: Setting, stage: Stage, tokens: int) -> float:
    """Milliseconds of all but experts that every token passes: attention's projections, shared experts, dense MLPs."""
    weights = stage_weights(setting.facts, setting.inventory, setting.layout, setting.plan, stage)
    size = weights.attention + weights.shared + weights.dense + weights.other
    width = setting.inventory.sliced / setting.inventory.attention.sliced  # bytes of a value
    return max(size / setting.gpu.bandwidth, 2 * tokens * size / width / _arithmetic(setting)) * 1e3


def _head_ms(setting: Setting, stage: Stage, rows: int) -> float:
    """Milliseconds of the output head on ``rows`` tokens, the one of each sequence that gets logits."""
    if not stage.has_head:
        return 0.0
    size = head_bytes(setting.facts, setting.inventory, setting.layout)
    arithmetic = 2 * rows * size / ACTIVATION_BYTES / (setting.gpu.tflops * 1e12)  # heads are stored in BF16
    return max(size / setting.gpu.bandwidth, arithmetic) * 1e3


def _arithmetic(setting: Setting) -> float:
    """Operations a second: FP8 where the experts are stored in FP8, else BF16 (4-bit weights are widened first)."""
    routed = setting.facts.tensor_class("routed")
    is_fp8 = routed is not None and "fp8" in routed.format_names
    return (setting.gpu.fp8_tflops if is_fp8 else setting.gpu.tflops) * 1e12
