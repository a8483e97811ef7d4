"""Step times: parts that can be recomputed by hand, and the directions in which they must move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep2tp.planner.compare import assess
from ep2tp.planner.layouts import Layout, layouts_for
from ep2tp.planner.links import built_in
from ep2tp.planner.memory import shard_plan, stages_of, weights_of
from ep2tp.planner.straggler import expected_hits, expert_load
from ep2tp.planner.timing import Setting, _head_ms, step_collectives
from tests.planner.models import assessed, model

NAME, FORM = "Qwen3-30B-A3B", "bf16"


def test_decode_by_hand() -> None:
    """Qwen3-30B, BF16, TP 4, batch 8: every number from the config, none from the planner."""
    _, plans = assessed(NAME, FORM, 4, "H100", "nvlink", batches=(8,), context=1000)
    hits = 128 * (1 - (1 - 8 / 128) ** 8)
    experts = 48 * hits * 3 * 2048 * 768 * 2 / 4
    attention = 48 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128) * 2 / 4
    others = 151936 * 2048 * 2 / 4 + 48 * 128 * 2048 * 2
    step = plans["TP 4"].decode[8]
    assert step.weights == pytest.approx((experts + attention + others) / 3.35e12 * 1e3)
    assert step.cache == pytest.approx(8 * 1000 * 48 * 2 * 4 * 128 * 2 / 4 / 3.35e12 * 1e3)
    assert step.straggler == 0
    link = built_in()["nvlink"]
    payload = 8 * 2048 * 2
    collectives = (2 * 48 + 1) * link.us("all_reduce", 1.5 * payload, 4)
    assert step.communication == pytest.approx((collectives + link.us("all_gather", 0.75 * 8 * 151936 * 2, 4)) / 1e3)
    spread = plans["TEP 4"].decode[8]
    extra = 48 * (expert_load(8, 128, 8, 4).busiest - expected_hits(8, 128, 8) / 4) * 3 * 2048 * 768 * 2
    assert spread.straggler == pytest.approx(extra / 3.35e12 * 1e3)
    assert (spread.weights, spread.communication) == pytest.approx((step.weights, step.communication))


def test_a_prompt_has_logits_of_one_token() -> None:
    """Qwen3-30B, BF16, TP 4, a prompt of 2,048: one row of 151,936 logits is gathered, not 622 MB of them."""
    _, plans = assessed(NAME, FORM, 4, "H100", "nvlink", batches=(8,), prompt=2048)
    link, payload = built_in()["nvlink"], 2048 * 2048 * 2
    sums = (2 * 48 + 1) * link.us("all_reduce", 1.5 * payload, 4)
    step = plans["TP 4"].prefill
    assert step.communication == pytest.approx((sums + link.us("all_gather", 0.75 * 151936 * 2, 4)) / 1e3)
    attention = 48 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128) / 4 + 48 * 128 * 2048
    head = 151936 * 2048 * 2 / 4 / 3.35e12  # read once; the arithmetic of one row takes less
    arithmetic = 2 * 2048 * attention / 989e12
    reading = 48 * 128 * 3 * 2048 * 768 * 2 / 4 / 3.35e12  # of all experts, of which 2,048 tokens miss none
    assert step.weights == pytest.approx((reading + arithmetic + head) * 1e3)


def test_a_tied_head_is_read_whole() -> None:
    """ERNIE 4.5 has one matrix of 103,424 x 2,560 for embedding and head: a decode step reads all of it."""
    facts, inventory = model("ERNIE-4.5-21B-A3B")
    assert inventory.head == 0
    assert weights_of(facts, inventory, Layout("TP"), shard_plan(facts, Layout("TP"))).embeddings == 103424 * 2560 * 2
    setting = Setting(facts, inventory, shard_plan(facts, Layout("TP")), Layout("TP"), *machine())
    [stage] = stages_of(facts, inventory, 1)
    assert _head_ms(setting, stage, 1) == pytest.approx(103424 * 2560 * 2 / 3.35e12 * 1e3)
    assert _head_ms(setting, stage, 4096) == pytest.approx(2 * 4096 * 103424 * 2560 / 989e12 * 1e3)


def test_collectives_of_a_step() -> None:
    """What vLLM does: TP ends attention and MLP with an all_reduce each; DEP only dispatches and combines."""
    facts, inventory = model("DeepSeek-V3/R1/V3.1")
    counts = {}
    for layout in layouts_for(4):
        setting = Setting(facts, inventory, shard_plan(facts, layout), layout, *machine())
        [stage, *_] = stages_of(facts, inventory, layout.pp)
        found: dict[str, int] = {}
        for times, collective in step_collectives(setting, stage, 8, 8):
            found[collective.kind] = found.get(collective.kind, 0) + times
        counts[str(layout)] = found
    assert counts["TP 4"] == counts["TEP 4"] == counts["TPxEP 2x2"] == {"all_reduce": 61 + 58 + 3 + 1, "all_gather": 1}
    assert counts["DEP 4"] == {"all_gather": 58, "reduce_scatter": 58}
    assert counts["TPxPP 2x2"] == {"all_reduce": 31 + 28 + 3 + 1, "send": 1}
    assert counts["TPxPP 1x4"] == {"send": 1}


def machine() -> tuple:
    question, _ = assessed(NAME, FORM, 2, "H100", "nvlink", batches=(1,))
    return question.gpu, question.link


@settings(max_examples=25)
@given(
    name=st.sampled_from(["DeepSeek-V3/R1/V3.1", "Qwen3-235B-A22B", "GLM-4.5/4.6/4.7"]),
    gpus=st.sampled_from([2, 4, 8]),
    batch=st.integers(1, 48),
    context=st.integers(1, 32_768),
)
def test_more_work_takes_longer(name: str, gpus: int, batch: int, context: int) -> None:
    question, _ = assessed(name, "fp8_block128", gpus, batches=(1,))
    question = replace(question, batches=(batch, batch + 16), context=context)
    for layout in layouts_for(gpus):
        found = assess(question, layout)
        few, many = found.decode[batch], found.decode[batch + 16]
        assert few.total < many.total * 1.001
        assert min(vars(few).values()) > -0.01 * few.total
        longer = assess(replace(question, context=context + 1000), layout)
        assert few.total < longer.decode[batch].total
        slower = assess(replace(question, link=built_in()["socket"]), layout)
        assert few.communication <= slower.decode[batch].communication
        faster = assess(replace(question, gpu=replace(question.gpu, bandwidth=2 * question.gpu.bandwidth)), layout)
        assert faster.decode[batch].total < few.total


def test_sparse_attention_reads_what_its_indexer_selects() -> None:
    """DeepSeek-V3.2 at 65,536 tokens: all keys of the indexer, latents of 2,048 tokens; all of both are kept."""
    question, plans = assessed("DeepSeek-V3.2(-Exp)", "fp8_block128", 8, "H200", "nvlink", batches=(1,), context=65536)
    layer = 65536 * 132 + 2048 * 576 * 2
    assert plans["TP 8"].decode[1].cache == pytest.approx(61 * layer / 4.8e12 * 1e3)
    assert plans["TP 8"].cache == 61 * 65536 * (132 + 576 * 2)
    attention = question.inventory.attention
    assert attention.read_of(2048) == attention.cache_of(2048) == 2048 * (132 + 576 * 2)


def test_of_compressed_layers_half_are_sparse() -> None:
    """V4-Flash, 65,536 tokens: 21 layers compress by 4 and select 512 entries, 20 by 128; all have windows."""
    _, inventory = model("DeepSeek-V4-Flash")
    windows, fours, wides = 43 * 128 * 584, 21 * 65536 / 4, 20 * 65536 / 128 * 584
    assert 43 * inventory.attention.cache_of(65536) == pytest.approx(windows + fours * (132 + 584) + wides)
    assert 43 * inventory.attention.read_of(65536) == pytest.approx(windows + fours * 132 + 21 * 512 * 584 + wides)


def test_a_decode_step_reads_no_encoder_but_norms_and_routers() -> None:
    question, plans = assessed(NAME, FORM, 4, "H100", "nvlink", batches=(1,))
    before = plans["TP 4"].decode[1].weights, plans["TPxPP 1x4"].decode[1].weights
    more = replace(question, inventory=replace(question.inventory, encoder=1e9, other=4.8e6))
    after = {str(layout): assess(more, layout) for layout in layouts_for(4)}
    ms = 4.8e6 / 3.35e12 * 1e3
    assert after["TP 4"].decode[1].weights - before[0] == pytest.approx(ms)
    assert after["TPxPP 1x4"].decode[1].weights - before[1] == pytest.approx(ms)  # a quarter, in each of four stages
    for name in ("TP 4", "TPxPP 1x4"):  # both engines build the encoder on every stage
        extra = 1e9 + 4.8e6 / (4 if "PP" in name else 1)
        assert after[name].weights.total - plans[name].weights.total == pytest.approx(extra)


def test_a_long_prompt_is_bound_by_arithmetic_and_a_short_one_by_bandwidth() -> None:
    times = []
    for tokens in (1, 16384, 32768):
        _, plans = assessed(NAME, FORM, 2, "H100", "nvlink", batches=(1,), prompt=tokens)
        times.append(plans["TP 2"].prefill.weights)
    assert times[2] == pytest.approx(2 * times[1], rel=0.01)
    assert times[1] > 2 * times[0]
