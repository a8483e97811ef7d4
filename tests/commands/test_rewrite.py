from __future__ import annotations

import shlex

import pytest

from ep2tp.commands.rewrite import model_of, rewrite_command
from ep2tp.errors import LaunchError
from ep2tp.rewrite.parallel_plan import Limits


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("vllm serve M --tensor-parallel-size 2 --enable-expert-parallel", "vllm serve M --tensor-parallel-size 2"),
        ("vllm serve M -tp=2 -ep --port 80", "vllm serve M -tp=2 --port 80"),
        (
            "vllm serve M --data-parallel-size 4 --enable-expert-parallel --all2all-backend deepep_low_latency",
            "vllm serve M --tensor-parallel-size 4",
        ),
        ("vllm serve M -tp 2 --data_parallel_size=4 --enable_expert_parallel", "vllm serve M --tensor-parallel-size 8"),
        (
            "env X=1 vllm serve M -ep --enable-eplb --eplb-config.num_redundant_experts 32 -tp 8",
            "env X=1 vllm serve M -tp 8",
        ),
        ("vllm serve M -tp 4 --no-enable-expert-parallel", "vllm serve M -tp 4 --no-enable-expert-parallel"),
        ("vllm serve M -tp 4", "vllm serve M -tp 4"),
        (
            "vllm serve M -dp 2 -dpb ray -ep",
            "vllm serve M --tensor-parallel-size 2 --distributed-executor-backend ray",
        ),
        (
            "python3 -m vllm.entrypoints.openai.api_server --model M -dp 2 -ep",
            "python3 -m vllm.entrypoints.openai.api_server --model M --tensor-parallel-size 2",
        ),
        (
            "python -m sglang.launch_server --model-path M --tp 8 --ep-size 8 --moe-a2a-backend deepep"
            " --enable-dp-attention --dp-size 8",
            "python -m sglang.launch_server --model-path M --tp 8",
        ),
        ("sglang serve --model-path M --tp 8 --ep 8 --dp 2", "sglang serve --model-path M --tp 8 --dp 2"),
    ],
)
def test_commands(command: str, expected: str) -> None:
    assert shlex.join(rewrite_command(shlex.split(command)).words) == expected


def test_a_command_of_another_program_is_refused() -> None:
    with pytest.raises(LaunchError, match="trtllm-serve M: starts neither vLLM nor SGLang"):
        rewrite_command(["trtllm-serve", "M"])


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(LaunchError, match="--data-parallel-size: the command ends"):
        rewrite_command(shlex.split("vllm serve M -ep --data-parallel-size"))


def test_settings_in_a_file_are_refused() -> None:
    with pytest.raises(LaunchError, match="--config: settings in a file"):
        rewrite_command(shlex.split("vllm serve M --config recipe.yaml"))


def test_heads_are_checked_where_the_model_is_known() -> None:
    with pytest.raises(LaunchError, match="64 attention heads"):
        rewrite_command(shlex.split("vllm serve M -ep -dp 3"), Limits(64))


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("vllm serve org/M -ep", "org/M"),
        ("python -m sglang.launch_server --model-path=org/M", "org/M"),
        ("python -m vllm.entrypoints.openai.api_server --model org/M", "org/M"),
        ("vllm serve --port 1", None),
    ],
)
def test_the_model_of_a_command(command: str, model: str | None) -> None:
    assert model_of(shlex.split(command)) == model


def test_prefill_context_parallelism_is_taken_out_only_where_it_needs_deepep() -> None:
    words = ["sglang", "serve", "--model-path", "m", "--tp", "8", "--enable-prefill-cp"]
    assert rewrite_command(words, config={"num_key_value_heads": 8}).changes == []
    assert rewrite_command(words, config={"kv_lora_rank": 512}).words == words[:-1]
