"""Printed launches are ones that the engine takes: no command for what the planner itself says is refused."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ep2tp.errors import SettingError
from ep2tp.planner.advise import advise
from ep2tp.planner.launch import launches
from ep2tp.planner.memory import GB, usable_bytes
from ep2tp.planner.profile import find_link, write_profile
from ep2tp.planner.report import print_report
from tests.planner.models import assessed
from tests.planner.test_links import profile


def test_no_command_where_an_engine_refuses_the_number_of_experts() -> None:
    """vLLM deals 128 experts out over 3 ranks unevenly; SGLang asserts."""
    question, plans = assessed("GLM-4.5-Air", "bf16", 3, "H200", "host", batches=(1,))
    found = launches(question, plans["DEP 3"])
    assert found["vllm"].command
    assert not found["sglang"].command
    assert "SGLang 0.5.23 refuses experts (128 over 3)" in str(found["sglang"])
    question, plans = assessed("GLM-4.5-Air", "bf16", 4, "H200", "host", batches=(1,))
    assert launches(question, plans["DEP 4"])["sglang"].command


def test_the_chosen_plan_is_among_those_that_do_not_divide() -> None:
    question, plans = assessed("GLM-4.5-Air", "bf16", 3, "H200", "host", batches=(1,))
    chosen = [plans["DEP 3"]]
    console = Console(file=io.StringIO(), width=200)
    print_report(console, question, chosen, advise(question, chosen))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "DEP 3 does not divide" in text
    assert "# SGLang 0.5.23 refuses experts (128 over 3)" in text
    assert "--dp-size" not in text


def test_ep2tp_does_not_pad_a_plan_with_whole_experts_but_reshard_does() -> None:
    question, plans = assessed("GLM-4.5/4.6/4.7", "fp8_block128", 8)
    for launch in launches(question, plans["TEP 8"]).values():
        assert not launch.command
        assert "refuses shared (1536 over 8)" in launch.note
        assert "ep2tp reshard --tp 8" in launch.note
    for launch in launches(question, plans["TP 8"]).values():
        assert launch.environment["EP2TP"] == "on"
        assert launch.command


@pytest.mark.parametrize(
    ("link", "variable", "has_custom"), [("pcie5", "NCCL_P2P_LEVEL=SYS", True), ("host", "NCCL_P2P_DISABLE=1", False)]
)
def test_a_link_without_peers_turns_them_off_in_both_engines(link: str, variable: str, has_custom: bool) -> None:
    question, plans = assessed("Qwen3-30B-A3B", "fp8_block128", 2, link=link)
    for launch in launches(question, plans["TP 2"]).values():
        assert re.findall(r"NCCL_\S+", str(launch)) == [variable]
        assert ("--disable-custom-all-reduce" not in launch.command) == has_custom


def test_a_profile_gives_the_variables_that_it_was_measured_with(tmp_path: Path) -> None:
    question, plans = assessed("Qwen3-30B-A3B", "fp8_block128", 4)
    path = tmp_path / "machine.json"
    write_profile(path, profile(environment={"NCCL_P2P_DISABLE": "1", "NCCL_IB_HCA": "=mlx5_0; x"}))
    measured = replace(question, link=find_link(str(path)))
    for launch in launches(measured, plans["TP 4"]).values():
        assert "NCCL_P2P_DISABLE=1 NCCL_IB_HCA='=mlx5_0; x'" in str(launch)
        assert "--disable-custom-all-reduce" in launch.command
    assert any("variables of the measured profile" in reason for reason in advise(measured, [plans["TP 4"]]).reasons)


def test_the_name_of_a_profile_says_nothing(tmp_path: Path) -> None:
    question, plans = assessed("Qwen3-30B-A3B", "fp8_block128", 4)
    path = tmp_path / "socket.json"
    write_profile(path, profile(environment={}))
    for launch in launches(replace(question, link=find_link(str(path))), plans["TP 4"]).values():
        assert "NCCL" not in str(launch)
        assert "--disable-custom-all-reduce" not in launch.command


@pytest.mark.parametrize("environment", [{"PATH": "/tmp"}, {"NCCL_X;rm": "1"}, {"NCCL_X": 1}, ["NCCL_X"]])
def test_a_profile_with_other_variables_is_refused(tmp_path: Path, environment: object) -> None:
    path = tmp_path / "machine.json"
    write_profile(path, profile(environment=environment))
    with pytest.raises(SettingError, match=r"machine\.json"):
        find_link(str(path))


@pytest.mark.parametrize(("context", "launched"), [(131072, 131072), (262144, 131072)])
def test_a_launch_has_no_longer_context_than_the_model(context: int, launched: int) -> None:
    question, plans = assessed("GLM-4.5-Air", "bf16", 4, "H200", context=context)
    facts = replace(question.facts, config={**question.facts.config, "max_position_embeddings": 131072})
    found = advise(replace(question, facts=facts), list(plans.values()))
    for launch in found.commands.values():
        flag = "--max-model-len" if "--max-model-len" in launch.command else "--context-length"
        assert launch.command[launch.command.index(flag) + 1] == str(launched)
    said = [reason for reason in found.reasons if "max_position_embeddings" in reason]
    assert len(said) == (context > launched)


@pytest.mark.parametrize("plan", ["TP 8", "TEP 8", "DEP 8", "TPxPP 4x2", "TPxEP 4x2"])
@pytest.mark.parametrize(("gpu", "share"), [("RTX PRO 6000", "0.88"), ("RTX 5090", "0.84"), ("H200", "0.88")])
def test_sglang_is_given_the_memory_that_the_planner_counts(plan: str, gpu: str, share: str) -> None:
    question, plans = assessed("Qwen3-30B-A3B", "bf16", 8, gpu)
    found = launches(question, plans[plan])
    command = found["sglang"].command
    assert command[command.index("--mem-fraction-static") + 1] == share
    assert "--mem-fraction-static" not in found["vllm"].command
    assert float(share) <= usable_bytes(question.gpu.memory_gb) / (question.gpu.memory_gb * GB) < float(share) + 0.01


def test_a_revision_is_part_of_the_launch() -> None:
    question, plans = assessed("Qwen3-30B-A3B", "fp8_block128", 4)
    for launch in launches(replace(question, revision="v1"), plans["TP 4"]).values():
        assert launch.command[launch.command.index("--revision") + 1] == "v1"
    for launch in launches(question, plans["TP 4"]).values():
        assert "--revision" not in launch.command


@pytest.mark.parametrize(("gpus", "is_said"), [(8, False), (16, True)])
def test_a_command_for_more_gpus_than_a_usual_node_has_says_that_it_is_for_one(gpus: int, is_said: bool) -> None:
    question, plans = assessed("DeepSeek-V3/R1/V3.1", "fp8_block128", gpus)
    found = advise(question, list(plans.values()))
    console = Console(file=io.StringIO(), width=200)
    print_report(console, question, list(plans.values()), found)
    note = f"for one node with {gpus} GPUs. For several nodes, run it on each of them with --nnodes"
    assert (note in console.file.getvalue()) == is_said  # type: ignore[attr-defined]
    assert any(note in reason for reason in found.reasons) == is_said  # which the JSON has
    assert all(launch.command and "--nnodes" not in launch.command for launch in found.commands.values())


def test_without_a_command_nothing_is_said_of_nodes() -> None:
    question, plans = assessed("GLM-4.5/4.6/4.7", "fp8_block128", 16)
    found = advise(question, [plans["TEP 16"]])
    assert (found.best, found.commands) == (None, {})
    assert "--nnodes" not in " ".join(found.reasons)


def test_sglang_slices_dense_and_shared_weights_under_data_parallel_attention() -> None:
    """DeepSeek-V2-Lite: 10944 is not whole in blocks of 128, over 2 ranks 5472; no command for what is refused."""
    question, plans = assessed("DeepSeek-V2-Lite", "fp8_block128", 2, "H100", "host", batches=(1,))
    found = launches(question, plans["DEP 2"])
    assert "SGLang 0.5.23 refuses dense (10944 over 2)" in found["sglang"].note
    assert "vLLM 0.25.1, 0.32.0, 0.33.0 refuses dense (10944 over 1)" in found["vllm"].note
    assert not any(launch.command for launch in found.values())
    assert not plans["DEP 2"].runs
    question, plans = assessed("GLM-4.5/4.6/4.7", "fp8_block128", 8, "H200")
    found = launches(question, plans["DEP 8"])
    assert found["vllm"].command
    assert "refuses shared (1536 over 8)" in found["sglang"].note


@pytest.mark.parametrize(("name", "form"), [("Qwen3-Next-80B", "fp8_block128"), ("ERNIE-4.5-21B-A3B", "bf16")])
def test_no_pipeline_stages_in_an_engine_whose_code_for_the_model_knows_none(name: str, form: str) -> None:
    question, found = assessed(name, form, 6, "RTX PRO 6000")
    for plan in (a for a in found.values() if a.layout.plan == "TPxPP"):
        both = launches(question, plan)
        assert both["vllm"].command
        assert not both["sglang"].command
        assert both["sglang"].note == (
            "SGLang 0.5.23 refuses pipeline stages: Pipeline Parallel is not compatible with this model"
        )


def test_ernie_has_no_data_parallel_attention_in_sglang() -> None:
    question, found = assessed("ERNIE-4.5-21B-A3B", "bf16", 2, "RTX PRO 6000")
    both = launches(question, found["DEP 2"])
    assert not both["sglang"].command
    assert both["vllm"].command


def test_one_gpu_exchanges_nothing() -> None:
    question, found = assessed("Qwen3-30B-A3B", "bf16", 1, "RTX PRO 6000")
    for launch in launches(question, found["TP 1"]).values():
        assert not [name for name in launch.environment if name.startswith("NCCL")]
        assert "--disable-custom-all-reduce" not in launch.command


@pytest.mark.parametrize(("gpus", "is_given"), [(4, False), (8, True)])
def test_an_image_encoder_that_vllm_cannot_slice_encodes_whole_images(gpus: int, is_given: bool) -> None:
    question, found = assessed("GLM-4.5-Air", "bf16", gpus, "RTX PRO 6000")
    config = {**question.facts.config, "vision_config": {"num_heads": 12}}
    asked = replace(question, facts=replace(question.facts, config=config))
    command = launches(asked, found[f"TP {gpus}"])["vllm"].command
    assert ("--mm-encoder-tp-mode" in command) is is_given
