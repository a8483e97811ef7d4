"""Real models for the planner's tests: config.json as published, by model and format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ep2tp.model.facts import ModelFacts, read_facts
from ep2tp.planner.compare import Assessment, Question, assess_all
from ep2tp.planner.gpus import find_gpu
from ep2tp.planner.inventory import Inventory, inventory_from_config
from ep2tp.planner.links import built_in
from tests.model.test_patches import EXPECTED, FAMILIES, config_of

MODELS = json.loads((Path(__file__).parents[1] / "data" / "planner_models.json").read_text(encoding="utf-8"))["models"]
EXPERTS = r"re:.*\.experts\.\d+\..*"
_FLOAT8 = {"num_bits": 8, "type": "float"}
_FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "group"}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def compressed(**groups: dict[str, Any]) -> dict[str, Any]:
    """compressed-tensors: ``routed`` for the experts, ``others`` for all other linear layers."""
    targets = {"routed": [EXPERTS], "others": ["Linear"]}
    found = {name: {"targets": targets[name], "weights": weights} for name, weights in groups.items()}
    return {"quant_method": "compressed-tensors", "config_groups": found, "ignore": ["lm_head"]}


def quantization(name: str, form: str) -> dict[str, Any] | None:
    """The quantization_config of a published checkpoint in this format."""
    is_v4 = name.startswith("DeepSeek-V4")
    others = {"others": {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]}} if is_v4 else {}
    if form == "mxfp4" and name.startswith("gpt-oss"):
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"]}
    if form == "mxfp4" and is_v4:
        return _BLOCKS
    packed = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {
        "bf16": None,
        "fp8_block128": {**_BLOCKS, "expert_dtype": "fp8"} if is_v4 else _BLOCKS,
        "fp8_channel": compressed(others={**_FLOAT8, "strategy": "channel"}),
        "nvfp4": compressed(routed={**_FLOAT4, "group_size": 16}, **others),
        "mxfp4": compressed(routed={**_FLOAT4, "group_size": 32}, **others),
        "awq_g128": {"quant_method": "awq", "bits": 4, "group_size": 128},
        "int4_g32": compressed(routed=packed) | {"format": "pack-quantized"},
    }[form]


def config(name: str, form: str = "bf16") -> dict[str, Any]:
    """A model's config.json."""
    found = config_of(name, FAMILIES[EXPECTED[name]])
    found.get("text_config", found).update(MODELS[name]["config"])
    if quant := quantization(name, form):
        found["quantization_config"] = quant
    return found


def model(name: str, form: str = "bf16") -> tuple[ModelFacts, Inventory]:
    """A model's facts and sizes."""
    facts = read_facts(config(name, form), FAMILIES[EXPECTED[name]], "test", name)
    return facts, inventory_from_config(facts)


def assessed(
    name: str, form: str, gpus: int, gpu: str = "RTX PRO 6000", link: str = "pcie5", **more: Any
) -> tuple[Question, dict[str, Assessment]]:
    """All plans of a model on some GPUs, by name such as ``TPxPP 2x2``."""
    question = Question(*model(name, form), gpus, find_gpu(gpu), built_in()[link], **more)
    return question, {str(a.layout): a for a in assess_all(question)}
