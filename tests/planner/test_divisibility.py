"""What stock engines do where blocks do not divide, against what is known of each model and format."""

from __future__ import annotations

import pytest

from ep2tp.model.sharding import plan_shards
from ep2tp.planner.divisibility import blockers, kv_copies, slices_below_block, stock_behaviour
from ep2tp.planner.layouts import Layout
from tests.planner.models import model


def outcomes(name: str, form: str, ranks: int) -> dict[tuple[str, str], str]:
    facts, _ = model(name, form)
    found = stock_behaviour(facts, Layout("TP", tp=ranks))
    return {(b.engine, b.versions): b.outcome for b in found if b.what.startswith("routed")}


@pytest.mark.parametrize(
    ("name", "form", "ranks", "vllm_025", "vllm_033", "sglang"),
    [
        ("Qwen3-235B-A22B", "fp8_block128", 4, "runs", "runs", "runs"),
        ("Qwen3-235B-A22B", "fp8_block128", 8, "refuses", "runs", "refuses"),  # 192: refined to 64
        ("Qwen3-30B-A3B", "fp8_block128", 16, "refuses", "refuses", "refuses"),  # 48: no block from 32 up
        ("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, "runs", "runs", "runs"),
        ("DeepSeek-V3/R1/V3.1", "fp8_block128", 32, "refuses", "runs", "refuses"),
        ("DeepSeek-V3/R1/V3.1", "fp8_block128", 3, "refuses", "refuses", "refuses"),
        ("gpt-oss-120b", "mxfp4", 8, "runs", "runs", "runs"),
        ("Qwen3-30B-A3B", "nvfp4", 32, "wrong in silence", "wrong in silence", "wrong in silence"),  # 24
        ("Kimi-K2-Thinking", "int4_g32", 64, "runs", "runs", "runs"),
        ("Kimi-K2-Thinking", "int4_g32", 128, "refuses", "refuses", "wrong in silence"),  # 16, groups of 32
        ("DeepSeek-V4-Pro", "mxfp4", 64, "wrong in silence", "wrong in silence", "refuses"),  # 48
        ("Qwen3-30B-A3B", "mxfp4", 16, "wrong in silence", "wrong in silence", "wrong in silence"),  # 48
        ("GLM-4.5/4.6/4.7", "fp8_channel", 8, "runs", "runs", "runs"),
        ("Qwen3-30B-A3B", "awq_g128", 8, "runs", "runs", "runs"),  # 96: three groups of 32
        ("Qwen3-30B-A3B", "awq_g128", 16, "refuses", "refuses", "runs"),  # 48; of SGLang nothing is known
    ],
)
def test_routed_experts(name: str, form: str, ranks: int, vllm_025: str, vllm_033: str, sglang: str) -> None:
    found = outcomes(name, form, ranks)

    def of(engine: str, version: str) -> str:
        return next((o for (e, v), o in found.items() if e == engine and (version in v or v == "all")), "runs")

    assert (of("vLLM", "0.25.1"), of("vLLM", "0.33.0"), of("SGLang", "0.5.23")) == (vllm_025, vllm_033, sglang)


def test_shared_and_dense_weights_are_refused_by_every_version() -> None:
    facts, _ = model("Qwen3-Next-80B", "fp8_block128")  # a shared expert of 512 over 8 is 64
    found = [b for b in stock_behaviour(facts, Layout("TP", tp=8)) if b.what.startswith("shared")]
    assert {(b.engine, b.outcome) for b in found} == {("vLLM", "refuses"), ("SGLang", "refuses")}
    assert all(
        "input_size_per_partition = 64 is not divisible by weight quantization block_k = 128" in b.text for b in found
    )


def test_whole_experts_leave_only_shared_and_dense_weights_to_divide() -> None:
    facts, _ = model("Qwen3-235B-A22B", "fp8_block128")
    assert stock_behaviour(facts, Layout("TEP", tp=8, ep=8)) == []
    uneven = stock_behaviour(facts, Layout("DEP", ep=6, dp=6))  # 128 experts
    assert {(b.engine, b.outcome) for b in uneven} == {("vLLM", "runs"), ("SGLang", "refuses")}
    facts, _ = model("GLM-4.5-Air", "bf16")
    assert stock_behaviour(facts, Layout("TP", tp=8)) == []


@pytest.mark.parametrize("name", ["Qwen3-235B-A22B", "Qwen3-Next-80B", "DeepSeek-V3/R1/V3.1", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_a_size_is_padded_exactly_where_an_engine_cannot_slice_whole_blocks(name: str, ranks: int) -> None:
    facts, _ = model(name, "fp8_block128")
    assert plan_shards(facts, ranks).is_padded == bool(stock_behaviour(facts, Layout("TP", tp=ranks)))


def test_blockers_are_what_padding_does_not_solve() -> None:
    facts, _ = model("GLM-4.7-Flash")  # 20 heads
    assert blockers(facts, Layout("TP", tp=4)) == []
    assert blockers(facts, Layout("TP", tp=8)) == ["20 attention heads do not divide over 8 ranks"]
    assert blockers(facts, Layout("DEP", ep=8, dp=8)) == []
    assert "65 groups" in blockers(facts, Layout("DEP", ep=65, dp=65))[0]


def test_kv_heads_are_copied_once_there_are_more_ranks() -> None:
    facts, _ = model("Qwen3-235B-A22B")
    assert [kv_copies(facts, Layout("TP", tp=n)) for n in (1, 4, 8)] == [1, 1, 2]
    facts, _ = model("DeepSeek-V3/R1/V3.1")
    assert [kv_copies(facts, Layout("TP", tp=n)) for n in (1, 8)] == [1, 8]


def test_slices_below_a_block() -> None:
    facts, _ = model("Qwen3-Next-80B", "fp8_block128")
    assert [c.name for c in slices_below_block(facts, Layout("TP", tp=8))] == ["routed", "shared"]
    assert slices_below_block(facts, Layout("TP", tp=4)) == []
