"""Which layers of a model hold experts, which a dense MLP, and how many; from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep2tp.errors import ModelError
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import config_parts


@dataclass(frozen=True)
class Layers:
    """The layers of a model by kind.

    Attributes:
        moe: numbers of the layers with routed experts, in order.
        dense: dense MLPs, by number of their layer; a layer may have several, and experts beside them (LongCat).
        attentions: attention modules per layer.
    """

    moe: tuple[int, ...]
    dense: tuple[int, ...]
    attentions: int = 1


def text_part(facts: ModelFacts) -> Mapping[str, Any]:
    """The part of the config that holds the language model's sizes."""
    name = facts.classes[0].field
    return [part for part in config_parts(facts.config) if part.get(name) is not None][-1]


def layers_of(facts: ModelFacts) -> Layers:
    """Which layers hold what."""
    part = text_part(facts)
    every = range(facts.layers)
    if facts.family.name == "longcat_flash":  # two attentions and two dense MLPs beside the experts of each layer
        return Layers(tuple(every), tuple(layer for layer in every for _ in range(2)), attentions=2)
    moe = tuple(layer for layer in every if _is_moe(layer, part))
    if not moe:
        raise ModelError(f"{facts.source}: config.json leaves none of its {facts.layers} layers for experts")
    has_dense = facts.tensor_class("dense") is not None
    return Layers(moe, tuple(layer for layer in every if layer not in set(moe)) if has_dense else ())


def _is_moe(layer: int, part: Mapping[str, Any]) -> bool:
    """The rules of Transformers' configurations and of remote-code configurations as vLLM 0.33.0 reads them."""
    for key, sparse in (("mlp_layer_types", ("sparse", "moe")), ("moe_layer_freq", (1, True))):
        listed = part.get(key)
        if isinstance(listed, Sequence) and not isinstance(listed, str):
            return bool(listed[layer] in sparse)
    for key in ("moe_layers_enum", "moe_layers"):
        if listed := part.get(key):
            numbers = listed.split(",") if isinstance(listed, str) else listed
            return layer in {int(number) for number in numbers}
    if layer in (part.get("mlp_only_layers") or ()):
        return False
    if "moe_layer_start_index" in part:  # ERNIE 4.5
        start, end = part["moe_layer_start_index"], part.get("moe_layer_end_index", -1)
        step = part.get("moe_layer_interval", 1)
        return bool(layer >= start and (end < 0 or layer <= end) and (layer + 1) % step == 0)
    step = part.get("decoder_sparse_step") or part.get("interleave_moe_layer_step") or 1
    return bool(layer >= (part.get("first_k_dense_replace") or 0) and (layer + 1) % step == 0)
