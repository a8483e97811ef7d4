"""Weights of real models on a GPU, against counted parameters and an independent table; conservation over ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep2tp.planner.attention import attention_of
from ep2tp.planner.cache_format import latent_bytes, value_bytes
from ep2tp.planner.inventory import _part_of
from ep2tp.planner.layouts import Layout, layouts_for, stage_layers
from ep2tp.planner.memory import GB, cache_per_sequence, growth, shard_plan, stage_weights, stages_of, weights_of
from tests.planner.models import MODELS, assessed, compressed, config, model

ROWS = [(name, form) for name, entry in MODELS.items() for form in entry["weights_gb"]]
GUESSED_ATTENTION = {"DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "Kimi-Linear-48B-A3B"}  # small parts are left out


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_those_counted_from_the_model_itself(name: str) -> None:
    facts, inventory = model(name)
    routed = len(inventory.layers.moe) * facts.experts * inventory.expert / 2
    assert len(inventory.layers.moe) == MODELS[name]["layers_with_experts"]
    assert routed == MODELS[name]["parameters"]["routed"]
    others = inventory.total(facts) / 2 - routed
    biases = 39_813_120 if name == "gpt-oss-120b" else 0  # of its experts, which the count has among the others
    tolerance = 0.01 if name in GUESSED_ATTENTION else 0.001  # norms and biases are left out
    assert others + biases == pytest.approx(MODELS[name]["parameters"]["others"], rel=tolerance)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("name", "form"), ROWS, ids=[f"{name}-{form}" for name, form in ROWS])
def test_weights_a_gpu(name: str, form: str, ranks: int) -> None:
    """The table slices everything evenly; the planner also knows what every rank holds whole, and padding."""
    facts, inventory = model(name, form)
    sliced, attention_whole, routed, _ = MODELS[name]["weights_gb"][form][str(ranks)]
    tp, dep = Layout("TP", tp=ranks), Layout("DEP", ep=ranks, dp=ranks)
    tp_weights, dep_weights = (weights_of(facts, inventory, x, shard_plan(facts, x)) for x in (tp, dep))
    once = inventory.replicated + inventory.kv * (ranks / inventory.attention.ranks_of_kv(ranks) - 1) / (ranks - 1)
    whole = facts.layers * once + len(inventory.layers.moe) * inventory.router
    evenly = tp_weights.total - tp_weights.padding - whole * (1 - 1 / ranks)
    correction = embedding_correction(name, form)
    # The table is rounded to 0.1 GB, and counts 2 bytes for a parameter that is not routed where V4 has 1.1.
    assert evenly / GB == pytest.approx(sliced + correction / ranks, rel=0.012, abs=0.06)
    assert dep_weights.total / GB == pytest.approx(attention_whole + correction, rel=0.02, abs=0.06)
    unpadded = tp_weights.routed / growth(shard_plan(facts, tp), "routed")
    assert unpadded / GB == pytest.approx(routed, rel=0.005, abs=0.06)
    assert dep_weights.routed == pytest.approx(unpadded)
    assert (tp_weights.total - tp_weights.padding) / GB == pytest.approx(sliced, rel=0.07, abs=0.06)


def embedding_correction(name: str, form: str) -> float:
    """GB that the table misses in FP8: it counts 1.08 bytes a parameter, where embeddings have 2 and the rest 1."""
    if not form.startswith("fp8"):
        return 0.0
    _, inventory = model(name)
    embeddings = (inventory.embedding + inventory.head + len(inventory.layers.moe) * inventory.router) / 2
    others = MODELS[name]["parameters"]["others"]
    return (embeddings * 2 + (others - embeddings) - 1.08 * others) / GB


PADDED = [row for row in ROWS if row[1] == "fp8_block128"]


@pytest.mark.parametrize(("name", "form"), PADDED, ids=[name for name, _ in PADDED])
def test_padded_routed_experts(name: str, form: str) -> None:
    facts, inventory = model(name, form)
    layout = Layout("TP", tp=8)
    found = weights_of(facts, inventory, layout, shard_plan(facts, layout))
    assert found.routed / GB == pytest.approx(MODELS[name]["weights_gb"][form]["8"][3], rel=0.005, abs=0.06)


@pytest.mark.parametrize(
    ("name", "form", "gpus", "percent"),
    [
        ("Qwen3-235B-A22B", "fp8_block128", 8, 100 / 3),
        ("Qwen3-235B-A22B", "fp8_block128", 4, 0),
        ("Qwen3-Coder-480B", "fp8_block128", 8, 20),
        ("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, 0),
        ("Qwen3-Next-80B", "fp8_block128", 8, 100),  # shared experts double, too
    ],
)
def test_padding_share(name: str, form: str, gpus: int, percent: float) -> None:
    _, plans = assessed(name, form, gpus)
    assert 100 * plans[f"TP {gpus}"].weights.padding_share == pytest.approx(percent)
    assert plans[f"DEP {gpus}"].weights.padding == 0


def test_latent_cache_is_held_by_every_rank_and_kv_heads_by_no_more_than_there_are() -> None:
    facts, inventory = model("DeepSeek-V3/R1/V3.1")
    caches = [cache_per_sequence(facts, inventory, Layout("TP", tp=n), 1000) for n in (1, 2, 8)]
    assert caches == [61 * 576 * 2 * 1000] * 3
    facts, inventory = model("Qwen3-235B-A22B")  # 4 KV heads
    caches = [cache_per_sequence(facts, inventory, Layout("TP", tp=n), 1000) for n in (1, 2, 4, 8)]
    assert caches == [94 * 2 * 4 * 128 * 2 * 1000 / n for n in (1, 2, 4, 4)]


MODELOPT_FP8 = {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}


@pytest.mark.parametrize(
    ("quantization", "width"),
    [
        (None, 2),
        (MODELOPT_FP8, 1),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, 1),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, 1),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": None}}, 2),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}, 1),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, 2),
        (compressed() | {"kv_cache_scheme": None}, 2),
    ],
)
def test_a_checkpoint_may_ask_for_a_cache_in_fp8(quantization: dict[str, Any] | None, width: int) -> None:
    gqa, mla, sparse = (config(name) for name in ("Qwen3-235B-A22B", "DeepSeek-V3/R1/V3.1", "DeepSeek-V3.2(-Exp)"))
    for found in (gqa, mla, sparse):
        found["quantization_config"] = quantization
    assert value_bytes(gqa) == width
    assert value_bytes({"text_config": gqa}) == width
    assert latent_bytes(mla, 512, 64, is_sparse=False) == 576 * width
    assert latent_bytes(sparse, 512, 64, is_sparse=True) == (656 if width == 1 else 1152)
    facts, _ = model("Qwen3-235B-A22B")
    assert attention_of(replace(facts, config=gqa)).cache_of(1000) == 2 * 4 * 128 * width * 1000


def test_what_belongs_to_an_encoder() -> None:
    """Its layers are neither MTP layers nor the text model's attention, whatever their number."""
    facts, _ = model("Qwen3-30B-A3B")
    names = {
        "model.visual.blocks.0.attn.qkv.weight": "encoder",
        "vision_tower.encoder.layers.60.self_attn.q_proj.weight": "encoder",
        "vision_model.model.layers.3.mlp.fc1.weight": "encoder",
        "mm_projector.proj.0.weight": "encoder",
        "multi_modal_projector.linear_1.weight": "encoder",
        "model.vit_large_projector.weight": "encoder",
        "audio_encoder.layers.0.fc1.weight": "encoder",
        "speech_embeddings.0.weight": "encoder",
        "model.layers.3.self_attn.q_proj.weight": "sliced",
        "model.layers.3.input_layernorm.weight": "other",
        "model.norm.weight": "other",
        "model.layers.3.mlp.gate.weight": "router",
        "model.layers.48.eh_proj.weight": "mtp",
    }
    assert {name: _part_of(facts, name) for name in names} == names


def test_a_sliding_window_bounds_the_cache() -> None:
    facts, inventory = model("gpt-oss-120b")
    per_layer = 2 * 8 * 64 * 2
    assert cache_per_sequence(facts, inventory, Layout("TP"), 10_000) == 18 * per_layer * (10_000 + 128)


@settings(max_examples=60)
@given(
    name=st.sampled_from(["DeepSeek-V3/R1/V3.1", "GLM-4.5/4.6/4.7", "Qwen3-235B-A22B", "gpt-oss-120b"]),
    gpus=st.sampled_from([2, 4, 8]),
)
def test_ranks_hold_the_model_together(name: str, gpus: int) -> None:
    """What the ranks of all stages hold, less copies and padding, is the model."""
    facts, inventory = model(name)
    for layout in layouts_for(gpus):
        plan = shard_plan(facts, layout)
        held = 0.0
        for stage in stages_of(facts, inventory, layout.pp):
            weights = stage_weights(facts, inventory, layout, plan, stage)
            held += layout.stage_ranks * weights.routed / growth(plan, "routed")
            held += layout.attention_ranks * (weights.shared / growth(plan, "shared"))
            held += layout.attention_ranks * (weights.dense / growth(plan, "dense"))
        moe = len(inventory.layers.moe)
        mlps = (
            moe * (facts.experts * inventory.expert + inventory.shared) + len(inventory.layers.dense) * inventory.dense
        )
        assert held == pytest.approx(mlps)


@settings(max_examples=50)
@given(name=st.sampled_from(sorted(MODELS)), gpus=st.sampled_from([1, 2, 4, 8]))
def test_more_gpus_never_hold_more(name: str, gpus: int) -> None:
    facts, inventory = model(name)
    for kind in (
        lambda n: Layout("TP", tp=n),
        lambda n: Layout("TEP", tp=n, ep=n),
        lambda n: Layout("DEP", ep=n, dp=n),
    ):
        few, many = (weights_of(facts, inventory, x, shard_plan(facts, x)) for x in (kind(gpus), kind(2 * gpus)))
        assert many.total - many.padding <= few.total - few.padding + 1


@given(layers=st.integers(1, 200), stages=st.integers(1, 16))
def test_stages_hold_every_layer_once(layers: int, stages: int) -> None:
    found = stage_layers(layers, stages)
    assert sum(found) == layers
    assert max(found) - min(found) <= 1


@given(gpus=st.integers(1, 64))
def test_every_factorisation(gpus: int) -> None:
    found = layouts_for(gpus)
    assert all(layout.gpus == gpus for layout in found)
    divisors = [n for n in range(2, gpus + 1) if gpus % n == 0]
    assert {x.pp for x in found if x.plan == "TPxPP"} == set(divisors)
    assert {(x.tp, x.ep) for x in found if x.plan == "TPxEP"} == {(gpus // n, n) for n in divisors if n < gpus}
    assert len(set(map(str, found))) == len(found)
    assert math.prod((found[0].tp, found[0].pp)) == gpus
