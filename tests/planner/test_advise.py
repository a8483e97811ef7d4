"""The verdict on cases whose answer is known, in both directions."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from ep2tp.commands.rewrite import rewrite_command
from ep2tp.planner.advise import Verdict, advise
from ep2tp.planner.compare import Question, assess_all
from tests.planner.models import assessed


def verdict(name: str, form: str, gpus: int, gpu: str, link: str, **more: object) -> tuple[Question, Verdict]:
    question, plans = assessed(name, form, gpus, gpu, link, **more)
    return question, advise(question, list(plans.values()))


def test_tp_wins_at_batch_1_without_nvlink() -> None:
    _, found = verdict("DeepSeek-V2", "bf16", 8, "RTX PRO 6000", "pcie5", batches=(1,), context=2048)
    assert found.best is not None
    assert found.best.layout.plan == "TP"
    assert not found.ep_is_better
    assert any("TEP 8 takes" in reason and "busiest rank" in reason for reason in found.reasons)


def test_ep_wins_with_a_latent_cache_nvlink_and_a_large_batch() -> None:
    _, found = verdict("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, "H200", "nvlink", batches=(256,), context=8192)
    assert found.best is not None
    assert found.best.layout.plan == "DEP"
    assert found.ep_is_better
    assert not found.ep_is_unavoidable
    assert any(
        "TP 8 holds 83 sequences" in reason and "8 ranks hold the same KV cache" in reason for reason in found.reasons
    )


def test_the_batch_from_which_ep_wins_is_named() -> None:
    _, small = verdict("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, "H200", "nvlink", batches=(1,), context=8192)
    assert not small.ep_is_better
    [found] = [reason for reason in small.reasons if "becomes the better plan from about batch" in reason]
    assert small.where_ep_wins == found
    batch = int(found.split("batch ")[1].split()[0])
    _, large = verdict("DeepSeek-V3/R1/V3.1", "fp8_block128", 8, "H200", "nvlink", batches=(batch,), context=8192)
    assert large.ep_is_better
    assert large.where_ep_wins in large.reasons
    assert large.where_ep_wins.startswith(f"Expert parallelism is the better plan at batch {batch} (DEP 8)")
    _, never = verdict("Llama-4-Maverick", "fp8_channel", 8, "H100", "nvlink", batches=(1,), context=1024)
    assert never.where_ep_wins == ""
    assert any(
        "clearly faster up to batch 256" in reason and "none holds batch 1024" in reason for reason in never.reasons
    )


def test_ep_is_unavoidable_where_heads_do_not_divide() -> None:
    question, plans = assessed("GLM-4.7-Flash", "bf16", 8, "RTX 5090", "pcie5")
    whole = [plans[name] for name in ("TP 8", "TEP 8", "DEP 8")]  # without the stages that would run, too
    found = advise(question, whole)
    assert found.best is not None
    assert (found.best.layout.plan, found.ep_is_unavoidable) == ("DEP", True)
    assert any("unavoidable" in reason for reason in found.reasons)
    assert any("TP 8 cannot run" in reason and "20 attention heads" in reason for reason in found.reasons)


def test_ep_is_unavoidable_where_padding_does_not_fit() -> None:
    """Padding makes Qwen3-235B's experts a third larger over 8 ranks; it has no shared expert and no dense layer."""
    question, plans = assessed("Qwen3-235B-A22B", "fp8_block128", 8, "L4", "pcie5", context=1024)
    question = replace(question, gpu=replace(question.gpu, memory_gb=38))
    plans = {str(a.layout): a for a in assess_all(question)}
    assert (plans["TP 8"].fits, plans["TEP 8"].fits) == (False, True)
    found = advise(question, [plans["TP 8"], plans["TEP 8"]])
    assert found.best is plans["TEP 8"]
    assert found.ep_is_unavoidable
    assert any("TP 8 does not fit" in reason for reason in found.reasons)


def test_a_plan_that_neither_engine_runs_is_not_named() -> None:
    """GLM-4.5's shared expert of 1536 over 8 ranks is 192: TEP runs in neither engine, padding grows all experts."""
    question, plans = assessed("GLM-4.5/4.6/4.7", "fp8_block128", 8, "H200", "nvlink", batches=(1, 64))
    assert not plans["TEP 8"].runs
    assert plans["TEP 8"].fits and not plans["TEP 8"].blockers
    found = advise(question, list(plans.values()))
    assert all(best is not plans["TEP 8"] for best in (found.best, *found.by_batch.values()))
    [why] = [reason for reason in found.reasons if reason.startswith("TEP 8 ")]
    assert "runs in neither engine" in why
    assert "ep2tp reshard --tp 8 writes a checkpoint that divides, with 33% more of routed experts" in why
    assert plans["DEP 8"].runs
    assert plans["DEP 8"].obstacle("vLLM") is None
    assert plans["DEP 8"].obstacle("SGLang") is not None


def test_what_cannot_run_is_not_the_least_of_what_does_not_fit() -> None:
    """TP 8 needs less than TP 4 on 4 stages, but 20 heads do not divide over 8."""
    question, plans = assessed("GLM-4.7-Flash", "bf16", 8, "RTX 5090", "pcie5")
    small = replace(question, gpu=replace(question.gpu, memory_gb=6))
    some = [a for a in assess_all(small) if str(a.layout) in ("TP 8", "TEP 8", "DEP 8")]
    found = advise(small, some)
    assert found.best is None
    assert found.reasons[0].startswith("No plan fits: DEP 8 needs least")
    found = advise(question, [plans["TP 8"], plans["TEP 8"]])
    assert found.reasons[0] == "No plan runs on this number of GPUs, whatever their memory."
    assert "20 attention heads" in found.reasons[1]


def test_nothing_fits() -> None:
    _, found = verdict("DeepSeek-V3/R1/V3.1", "fp8_block128", 2, "RTX 5090", "pcie5")
    assert found.best is None
    assert found.commands == {}
    assert found.by_batch == {1: None, 8: None, 64: None}
    assert "No plan fits" in found.reasons[0]
    assert "more GPUs" in found.reasons[0]


def test_a_batch_that_the_cache_does_not_hold_does_not_win() -> None:
    question, plans = assessed("DeepSeek-V3/R1/V3.1", "fp8_block128", 16, "RTX PRO 6000", "host", batches=(256,))
    assert not plans["TP 16"].holds(256)
    found = advise(question, list(plans.values()))
    assert found.best is not None
    assert found.best.holds(256)


@pytest.mark.parametrize("plan", ["TP 4", "TEP 4", "DEP 4", "TPxPP 2x2", "TPxEP 2x2"])
@pytest.mark.parametrize("link", ["nvlink", "pcie5", "host", "socket"])
def test_commands_mean_the_plan_that_they_are_for(plan: str, link: str) -> None:
    """ep2tp's own rewriter reads the parallel sizes of every command back."""
    question, plans = assessed("Qwen3-30B-A3B", "fp8_block128", 4, "RTX PRO 6000", link)
    found = advise(question, [plans[plan]]).commands
    layout = plans[plan].layout
    for engine, launch in found.items():
        if not launch.command:
            assert (plan, engine) == ("TPxEP 2x2", "vllm")
            continue
        words = shlex.split(str(launch))
        command = words[next(i for i, word in enumerate(words) if "=" not in word) :]
        rewritten = rewrite_command(tuple(command), None)
        assert bool(rewritten.changes) == layout.holds_whole_experts
        assert rewritten.gpus == layout.stage_ranks
        assert ("--disable-custom-all-reduce" in words) == (link in ("host", "socket"))
        assert any(word.startswith("NCCL_") for word in words) == (link != "nvlink")


def test_both_engines_are_told_to_pad_and_to_slice() -> None:
    question, plans = assessed("Qwen3-30B-A3B", "fp8_block128", 4)
    for launch in advise(question, [plans["TP 4"]]).commands.values():
        assert launch.environment["EP2TP"] == "on"
        assert "Qwen3-30B-A3B" in launch.command
    for launch in advise(question, [plans["TEP 4"]]).commands.values():
        assert launch.environment["EP2TP"] == "off"
