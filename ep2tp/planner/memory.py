"""What one GPU holds under a plan: weights by part, padding, KV cache, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from ep2tp.layout.split import round_up
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import ClassName
from ep2tp.model.sharding import ShardPlan, plan_shards
from ep2tp.planner.inventory import Inventory
from ep2tp.planner.layouts import Layout, stage_layers

GB = 1e9
UTILISATION = 0.9
"""Share of a GPU's memory that an engine uses; vLLM's default is 0.9 up to 0.25.1 (``--gpu-memory-utilization``)."""
RESERVED_GB = 2.0
"""Assumed: activations, CUDA graphs and communication buffers."""
_VOCABULARY_PADDING = 64  # vLLM and SGLang round the vocabulary up to a multiple of 64 before they slice it


@dataclass(frozen=True)
class Weights:
    """Bytes of weights on the GPU that holds most.

    Attributes:
        routed, shared, dense, attention, embeddings, other: by part, with padding; ``other`` is routers and norms.
        encoder: encoders of images and sound. Both engines build them on every pipeline stage, though only the first
            runs them (vLLM 0.32.0, SGLang 0.5.23: models/qwen3_vl.py); counted whole, though TP slices some.
        padding: bytes of these that are ep2tp's padding.
    """

    routed: float
    shared: float
    dense: float
    attention: float
    embeddings: float
    other: float
    encoder: float
    padding: float

    @property
    def total(self) -> float:
        """All of it."""
        mlp = self.routed + self.shared + self.dense
        return mlp + self.attention + self.embeddings + self.other + self.encoder

    @property
    def padding_share(self) -> float:
        """Growth of the MLP weights by padding: 0.333 where 1536 values in 128-blocks are held by 8 ranks."""
        mlp = self.routed + self.shared + self.dense
        return self.padding / (mlp - self.padding) if mlp > self.padding else 0.0


@dataclass(frozen=True)
class Stage:
    """The layers of one pipeline stage."""

    layers: int
    moe: int
    dense: int
    has_embedding: bool
    has_head: bool


def shard_plan(facts: ModelFacts, layout: Layout) -> ShardPlan:
    """ep2tp's plan of the MLP weights under a layout.

    Raises:
        ModelError: a class does not divide, and its format cannot be padded.
    """
    return plan_shards(facts, layout.slices, dense_ranks=layout.attention_ranks)


def growth(plan: ShardPlan, name: ClassName) -> float:
    """Padded over stored size of a class of weights."""
    split = plan.splits.get(name)
    return split.padded / split.size if split else 1.0


def stages_of(facts: ModelFacts, inventory: Inventory, stages: int) -> list[Stage]:
    """What each pipeline stage holds."""
    found, first = [], 0
    for number, count in enumerate(stage_layers(facts.layers, stages)):
        inside = range(first, first + count)
        moe = sum(layer in inside for layer in inventory.layers.moe)
        dense = sum(layer in inside for layer in inventory.layers.dense)
        found.append(Stage(count, moe, dense, number == 0, number == stages - 1))
        first += count
    return found


def weights_of(facts: ModelFacts, inventory: Inventory, layout: Layout, plan: ShardPlan) -> Weights:
    """Weights of the fullest GPU: of the largest pipeline stage, of the rank with most experts."""
    stages = stages_of(facts, inventory, layout.pp)
    return max((stage_weights(facts, inventory, layout, plan, s) for s in stages), key=lambda weights: weights.total)


def stage_weights(facts: ModelFacts, inventory: Inventory, layout: Layout, plan: ShardPlan, stage: Stage) -> Weights:
    """Weights of one rank of a stage: the one with most experts."""
    ranks = layout.attention_ranks
    experts = ceil(facts.experts / layout.ep)
    bare = {
        "routed": stage.moe * experts * inventory.expert / layout.slices,
        "shared": stage.moe * inventory.shared / ranks,
        "dense": stage.dense * inventory.dense / ranks,
    }
    padded = {name: size * growth(plan, name) for name, size in bare.items()}  # type: ignore[arg-type]
    attention = inventory.sliced / ranks + inventory.kv / inventory.attention.ranks_of_kv(ranks) + inventory.replicated
    head = head_bytes(facts, inventory, layout)
    embedding = inventory.embedding * _vocabulary_share(facts, layout)
    holds_one_for_both = stage.has_embedding and stage.has_head and not inventory.head
    return Weights(
        **padded,
        attention=stage.layers * attention,
        embeddings=stage.has_embedding * embedding + (stage.has_head and not holds_one_for_both) * head,
        other=stage.moe * inventory.router + inventory.other * stage.layers / facts.layers,
        encoder=inventory.encoder,
        padding=sum(padded.values()) - sum(bare.values()),
    )


def head_bytes(facts: ModelFacts, inventory: Inventory, layout: Layout) -> float:
    """Bytes of a rank's slice of the output head; where it is tied, that is the embedding."""
    return (inventory.head or inventory.embedding) * _vocabulary_share(facts, layout)


def _vocabulary_share(facts: ModelFacts, layout: Layout) -> float:
    """What one rank holds of a matrix with a row for every entry of the vocabulary."""
    vocabulary = facts.vocabulary or 1
    return round_up(vocabulary, _VOCABULARY_PADDING) / vocabulary / layout.attention_ranks


def cache_per_sequence(facts: ModelFacts, inventory: Inventory, layout: Layout, context: int) -> float:
    """Bytes of KV cache and state that a sequence of ``context`` tokens takes on each GPU with it (largest stage)."""
    layers = max(stage_layers(facts.layers, layout.pp))
    return layers * inventory.attention.held_on_rank(context, layout.attention_ranks)


def usable_bytes(memory_gb: float) -> float:
    """Bytes of a GPU that weights and KV cache may take (assumed: see :data:`UTILISATION`, :data:`RESERVED_GB`)."""
    return UTILISATION * memory_gb * GB - RESERVED_GB * GB


def usable_share(memory_gb: float) -> float:
    """:func:`usable_bytes` over a GPU's memory, rounded down to two decimals: SGLang's ``--mem-fraction-static``."""
    return floor(100 * usable_bytes(memory_gb) / (memory_gb * GB)) / 100
