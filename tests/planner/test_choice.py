"""The room for KV cache decides, and the verdict says so; a batch that a plan does not hold counts nowhere."""

from __future__ import annotations

from ep2tp.planner.advise import advise
from ep2tp.planner.choice import fastest
from ep2tp.planner.summary import summary
from tests.planner.models import assessed


def test_the_room_is_named_where_it_decides() -> None:
    """TP is the faster plan of batches 1 and 8, but only four stages hold 64 sequences of an MLA model."""
    question, plans = assessed("DeepSeek-V2", "bf16", 4, "H200", "host")
    assert [str(a.layout) for a in plans.values() if a.runs and a.holds(64)] == ["TPxPP 1x4"]
    found = advise(question, list(plans.values()))
    assert found.best is plans["TPxPP 1x4"]
    assert "the only plan whose KV cache holds 64 sequences" in found.reasons[0]
    assert "TP 4 is faster at smaller batches, but holds 25" in found.reasons[0]
    assert "least decode time" not in found.reasons[0]
    [tp] = [reason for reason in found.reasons if reason.startswith("TP 4 takes")]
    assert "at batch 1 and " in tp and "at batch 8" in tp and "64" not in tp
    assert "it holds 25 sequences" in tp


def test_the_room_is_not_named_where_all_have_it() -> None:
    question, plans = assessed("Qwen3-30B-A3B", "bf16", 2, "H200", "host", batches=(1, 64))
    found = advise(question, list(plans.values()))
    assert found.reasons[0].endswith("the least decode time of the plans that fit, over batches 1, 64.")


def test_a_batch_that_no_plan_holds_has_no_winner() -> None:
    question, plans = assessed("DeepSeek-V3/R1/V3.1", "fp8_block128", 8)
    most = max(a.sequences for a in plans.values() if a.runs)
    assert 8 <= most < 16
    found = advise(question, list(plans.values()))
    by_batch = summary(question, list(plans.values()), found)["verdict"]["by_batch"]
    assert (by_batch["1"], by_batch["64"]) == ("TP 8", None)
    assert "over batches 1, 8." in found.reasons[0]
    assert f"No plan that fits holds batch 64 of this context at once; TP 8 holds the most, {most}." in found.reasons
    assert any(
        "clearly faster up to batch 8 " in reason and "none holds batch 64" in reason for reason in found.reasons
    )
    assert not any("at batch 64" in reason or "1024" in reason for reason in found.reasons)


def test_a_batch_that_is_not_held_does_not_move_the_score() -> None:
    question, plans = assessed("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, batches=(1, 8))
    more, same = assessed("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, batches=(1, 8, 4096))
    best, of_more = advise(question, list(plans.values())).best, advise(more, list(same.values())).best
    assert best is not None and of_more is not None
    assert best.layout == of_more.layout


def test_where_no_batch_is_held_the_most_room_wins() -> None:
    question, plans = assessed("DeepSeek-V2", "bf16", 4, "H200", "host", batches=(512,))
    running = [a for a in plans.values() if a.runs]
    assert fastest(running, 512) is None
    found = advise(question, running)
    assert found.best is max(running, key=lambda a: a.sequences)
    assert "no plan that fits holds 512 sequences" in found.reasons[0]
    assert not any("faster" in reason for reason in found.reasons)


def test_expert_parallelism_that_wins_by_room_says_so() -> None:
    question, plans = assessed("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, "H200", "nvlink", batches=(256,))
    found = advise(question, [plans["TP 8"], plans["DEP 8"]])
    assert found.ep_is_better
    assert any("TP 8 holds 83 sequences of this context at once, since 8 ranks" in reason for reason in found.reasons)
