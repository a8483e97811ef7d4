"""The state of linear attention, against vLLM's own shapes and dtypes; its part in memory and in a decode step."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from ep2tp.model.facts import ModelFacts, read_facts
from ep2tp.planner.gpus import find_gpu
from ep2tp.planner.inventory import Inventory, inventory_from_config
from ep2tp.planner.layouts import Layout
from ep2tp.planner.links import built_in
from ep2tp.planner.memory import cache_per_sequence, shard_plan
from ep2tp.planner.timing import Setting, decode_step
from tests.model.test_patches import EXPECTED, FAMILIES
from tests.planner.models import assessed, config, model

KIMI, NEXT, LARGE = "Kimi-Linear-48B-A3B", "Qwen3-Next-80B", "Qwen3.5-397B-A17B"


def model_in(name: str, dtype: str | None) -> tuple[ModelFacts, Inventory]:
    """A model whose config names the dtype of its state."""
    found = config(name)
    found.get("text_config", found)["mamba_ssm_dtype"] = dtype
    facts = read_facts(found, FAMILIES[EXPECTED[name]], "test", name)
    return facts, inventory_from_config(facts)


def vllm_bytes(text: dict[str, Any], ranks: int, dtype: str | None) -> int:
    """Bytes of state of a sequence, on a rank and in a layer, as vLLM allocates them."""
    utils = pytest.importorskip("vllm.model_executor.layers.mamba.mamba_utils")
    torch = pytest.importorskip("torch")
    shapes, dtypes = utils.MambaStateShapeCalculator, utils.MambaStateDtypeCalculator
    if kda := text.get("linear_attn_config"):
        kernel = kda["short_conv_kernel_size"]
        shape = shapes.kda_state_shape(ranks, kda["num_heads"], kda["head_dim"], conv_kernel_size=kernel)
        width = dtypes.kda_state_dtype(torch.bfloat16, "auto", "auto")
    else:
        sizes = [text[f"linear_{size}"] for size in ("num_key_heads", "num_value_heads", "key_head_dim")]
        shape = shapes.gated_delta_net_state_shape(ranks, *sizes, text["linear_value_head_dim"], 4)
        width = dtypes.gated_delta_net_state_dtype(torch.bfloat16, "auto", dtype or "auto")
    return int(sum(prod(dims) * of.itemsize for dims, of in zip(shape, width, strict=True)))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    ("name", "dtype", "layers"),
    [(KIMI, None, 20), (NEXT, None, 36), (NEXT, "float32", 36), (LARGE, "bfloat16", 45), (LARGE, "float32", 45)],
)
def test_state_is_what_vllm_allocates(name: str, dtype: str | None, layers: int, ranks: int) -> None:
    facts, inventory = model_in(name, dtype)
    text = config(name)
    expected = layers * vllm_bytes(text.get("text_config", text), ranks, dtype)
    assert facts.layers * inventory.attention.state_on_rank(ranks) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "dtype", "megabytes"),
    [
        (KIMI, None, 10.9),
        (NEXT, None, 9.9),
        (NEXT, "float32", 19.3),
        (LARGE, "bfloat16", 24.4),
        (LARGE, "float32", 48.0),
    ],
)
def test_state_is_part_of_what_a_sequence_takes(name: str, dtype: str | None, megabytes: float) -> None:
    facts, inventory = model_in(name, dtype)
    layout = Layout("TP", tp=4)
    empty = cache_per_sequence(facts, inventory, layout, 0)
    assert empty / 1e6 == pytest.approx(megabytes, abs=0.05)
    token = cache_per_sequence(facts, inventory, layout, 1) - empty
    assert cache_per_sequence(facts, inventory, layout, 1000) == pytest.approx(empty + 1000 * token)


def test_fewer_sequences_fit() -> None:
    question, plans = assessed(KIMI, "bf16", 4, context=256)
    assert question.context == 256
    assert 4000 < plans["TP 4"].sequences < 6000


def test_a_decode_step_reads_and_writes_it() -> None:
    facts, inventory = model(NEXT)
    layout, gpu = Layout("TP", tp=4), find_gpu("H200")
    setting = Setting(facts, inventory, shard_plan(facts, layout), layout, gpu, built_in()["pcie5"])
    state = cache_per_sequence(facts, inventory, layout, 0)
    assert decode_step(setting, 8, 0).cache == pytest.approx(2 * 8 * state / gpu.bandwidth * 1e3)


@pytest.mark.parametrize("name", ["Qwen3-235B-A22B", "DeepSeek-V3/R1/V3.1"])
def test_other_attention_has_none(name: str) -> None:
    _, inventory = model(name)
    assert inventory.attention.state_on_rank(4) == 0
