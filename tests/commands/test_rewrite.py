from __future__ import annotations

import shlex

import pytest

from ep2tp.commands.engine_words import command_words, shell_line
from ep2tp.commands.rewrite import full_flags, model_of, rewrite_command
from ep2tp.engines.vllm.arguments import RULES as VLLM
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


@pytest.mark.parametrize(
    ("before", "engine", "after"),
    [
        ("docker run --name vllm lmsysorg/sglang:v0.5.23 python3", "-m sglang.launch_server --tp 8 --ep 8", "--tp 8"),
        ("conda run -n sglang", "vllm serve M -ep -tp 2", "M -tp 2"),
        ("docker run -dp 8000:8000 IMAGE", "vllm serve M -dp 4 -ep", "M --tensor-parallel-size 4"),
        ("docker --config DIR run -m 64g IMAGE", "/opt/venv/bin/vllm serve M -ep", "M"),
        ("nice -n 10", "vllm serve M -tp 8 -ep", "M -tp 8"),
        (
            "docker run -dp 80:80 --name vllm-openai vllm/vllm-openai:v0.33.0",
            "--model M -dp 4 -ep",
            "--model M --tensor-parallel-size 4",
        ),
        ("docker run -v x:/a/vllm-openai -dp 80:80 r.io:5000/vllm/vllm-openai-rocm", "--model M -ep", "--model M"),
        ("docker run --entrypoint vllm vllm/vllm-openai", "serve M -dp 4 -ep", "M --tensor-parallel-size 4"),
    ],
)
def test_words_before_the_engine_are_another_programs(before: str, engine: str, after: str) -> None:
    words = shlex.join(rewrite_command(shlex.split(f"{before} {engine}")).words)
    assert words.startswith(f"{before} ")
    assert words.endswith(f" {after}")


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        (
            """--speculative-config '{"method": "mtp", "draft_tensor_parallel_size": 2}'""",
            '{"method": "mtp", "draft_tensor_parallel_size": 8}',
        ),
        ("""-sc='{"method": "mtp", "moe_backend": "deep_gemm_mega_moe"}'""", '{"method": "mtp"}'),
        ("--speculative-config.draft_tensor_parallel_size 2", "8"),
        ("--speculative_config.draft_tensor_parallel_size=1", "1"),
        ("--speculative-config.moe_backend deep_gemm_mega_moe", None),
        (
            """--speculative-config '{"method": "mtp", "moe_backend": "triton"}'""",
            '{"method": "mtp", "moe_backend": "triton"}',
        ),
        ("--speculative-config '{not JSON'", "{not JSON"),
    ],
)
def test_a_draft_follows_the_launch(draft: str, expected: str | None) -> None:
    words = rewrite_command(shlex.split(f"vllm serve M -tp 2 -dp 4 -ep {draft} --port 80")).words
    found = [word for word in words if "spec" in word or word.startswith("-sc")]
    assert words[-2:] == ["--tensor-parallel-size", "8"]
    assert words[words.index("--port") :][:2] == ["--port", "80"]
    if expected is None:
        assert words == ["vllm", "serve", "M", "--port", "80", "--tensor-parallel-size", "8"]
    elif "=" in found[0]:
        assert found == [draft.split("=")[0] + "=" + expected]
    else:
        assert words[words.index(found[0]) + 1] == expected


def test_a_draft_of_a_launch_that_stays_as_it_is_stays_too() -> None:
    words = ["vllm", "serve", "M", "-tp", "4", "--speculative-config", '{"draft_tensor_parallel_size": 4}']
    assert rewrite_command(words).words == words


@pytest.mark.parametrize("before", ["srun -n 2", "nice -n 10", ""])
def test_a_number_before_the_engine_is_no_number_of_nodes(before: str) -> None:
    with pytest.raises(LaunchError, match="--data-parallel-size-local 8 of 16: other nodes"):
        rewrite_command(shlex.split(f"{before} vllm serve M -dp 16 -dpl 8 -ep"))


@pytest.mark.parametrize("command", ["trtllm-serve M", "docker run --name vllm IMAGE serve M -ep"])
def test_a_command_of_another_program_is_refused(command: str) -> None:
    with pytest.raises(LaunchError, match=f"{command}: starts neither vLLM nor SGLang"):
        rewrite_command(shlex.split(command))


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(LaunchError, match="--data-parallel-size: the command ends"):
        rewrite_command(shlex.split("vllm serve M -ep --data-parallel-size"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-tp 0", "--tensor-parallel-size 0: expected a number from 1 up"),
        ("-tp=", "--tensor-parallel-size : expected a number from 1 up"),
        ("-dp 0", "--data-parallel-size 0: expected a number from 1 up"),
        ("-dp -8", "--data-parallel-size -8: expected a number from 1 up"),
        ("-dp two", "--data-parallel-size two: expected a number from 1 up"),
        ("-dp 2 -dpl x", "--data-parallel-size-local x: expected a number from 0 up"),
        ("-dp 2 -dpl -1", "--data-parallel-size-local -1: expected a number from 0 up"),
        ("-dp 2 -dpl 1 -n 0", "--nnodes 0: expected a number from 1 up"),
    ],
)
def test_a_size_that_is_none_is_refused(words: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        rewrite_command(shlex.split(f"vllm serve M -ep {words}"))


@pytest.mark.parametrize("words", ["--config recipe.yaml", "--config=recipe.yaml"])
def test_settings_in_a_file_are_refused(words: str) -> None:
    with pytest.raises(LaunchError, match="--config: settings in a file"):
        rewrite_command(shlex.split(f"vllm serve M -dp 2 -ep {words}"))


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
        ("docker run --name serve --model x IMAGE vllm serve org/M", "org/M"),
        ("sglang serve org/M --tp 8", "org/M"),
        ("vllm serve -dp 3 -ep org/M", "org/M"),
        ("vllm serve --no-enable-eplb -dp 3 org/M --port 1", "org/M"),
        ("vllm serve --data-parallel-size=3 org/M -ep", "org/M"),
        ("vllm serve -ep --port 1 org/M", None),
        ("vllm serve -ep --trust-remote-code org/M", None),
        ("vllm bench throughput -ep --port 1", None),
        ("docker run -v /a:/b vllm/vllm-openai:latest org/M -dp 3 -ep", "org/M"),
        ("docker run vllm/vllm-openai:latest -dp 3 -ep org/M", "org/M"),
        ("docker run --entrypoint vllm vllm/vllm-openai:latest serve org/M", "org/M"),
        ("docker run vllm/vllm-openai:latest", None),
    ],
)
def test_the_model_of_a_command(command: str, model: str | None) -> None:
    assert model_of(shlex.split(command)) == model


def test_prefill_context_parallelism_is_taken_out_only_where_it_needs_deepep() -> None:
    words = ["sglang", "serve", "--model-path", "m", "--tp", "8", "--enable-prefill-cp"]
    assert rewrite_command(words, config={"num_key_value_heads": 8}).changes == []
    assert rewrite_command(words, config={"kv_lora_rank": 512}).words == words[:-1]


@pytest.mark.parametrize(
    ("words", "full"),
    [
        (
            "vllm serve M --tensor-parallel 8 -dp 2 -ep",
            "--tensor-parallel: write the flag in full: --tensor-parallel-size",
        ),
        ("vllm serve M -tp 8 --enable-expert", "--enable-expert: write the flag in full: --enable-expert-parallel"),
        ("vllm serve M -tp 8 -e", "-e: write the flag in full: -ep"),
        ("vllm serve M -ep --data_parallel_start=8", "in full: --data-parallel-start-rank"),
        ("vllm serve M --no-enable-expert", "in full: --no-enable-expert-parallel"),
        ("vllm serve M --kernel-conf.moe_backend X", "in full: --kernel-config"),
        ("vllm serve M --data-parallel-r 8 -ep", "in full: --data-parallel-rpc-port or --data-parallel-rank"),
        ("sglang serve M --tp 8 --expert-parallel 8", "in full: --expert-parallel-size"),
        ("sglang serve M --tp 8 --moe-a2a deepep", "in full: --moe-a2a-backend"),
    ],
)
def test_an_abbreviated_flag_is_refused(words: str, full: str) -> None:
    with pytest.raises(LaunchError, match=full):
        rewrite_command(shlex.split(words))
    with pytest.raises(LaunchError, match=full):
        model_of(shlex.split(words))


@pytest.mark.parametrize("word", ["-", "--", "-1", "-h", "M", "--n", "--max-model-len", "--no-enable-log-requests"])
def test_a_word_that_abbreviates_no_flag_of_the_rules_is_fine(word: str) -> None:
    assert full_flags(word, VLLM) == []


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ("""--kernel-config '{"moe_backend": "deep_gemm_mega_moe"}'""", ""),
        ("--kernel-config.moe_backend=deep_gemm_mega_moe", ""),
        ("--kernel_config.moe_backend deep_gemm_mega_moe", ""),
        ("--moe-backend auto --kernel-config.moe_backend deep_gemm_mega_moe", ""),
        ("--moe-backend deep_gemm_mega_moe --kernel-config.moe_backend triton", ""),
        (
            """--kernel-config='{"moe_backend": "deep-gemm-mega-moe", "x": 1}'""",
            """--kernel-config '{"x": 1}'""",
        ),
    ],
)
def test_a_kernel_config_with_a_backend_of_expert_parallelism_asks_for_it(kernels: str, expected: str) -> None:
    words = shlex.split(f"vllm serve M -dp 4 {kernels} --port 80")
    after = shlex.split(f"vllm serve M {expected} --port 80 --tensor-parallel-size 4")
    rewritten = rewrite_command(words)
    assert rewritten.words == after
    assert "moe_backend" in [change.setting.field for change in rewritten.changes]


@pytest.mark.parametrize(
    "kernels",
    [
        "--kernel-config.moe_backend triton",
        "--moe-backend triton --kernel-config.moe_backend deep_gemm_mega_moe",
        "--kernel-config '{not JSON'",
        "--kernel-config '[1]'",
        "--speculative-config.moe_backend deep_gemm_mega_moe",
    ],
)
def test_another_kernel_config_asks_for_nothing(kernels: str) -> None:
    words = shlex.split(f"vllm serve M -dp 4 {kernels}")
    assert rewrite_command(words).words == words


@pytest.mark.parametrize("flag", ["--kernel-config", "--speculative-config"])
def test_a_json_flag_without_its_value_is_refused(flag: str) -> None:
    with pytest.raises(LaunchError, match=f"{flag}: the command ends"):
        rewrite_command(shlex.split(f"vllm serve M -ep {flag}"))


@pytest.mark.parametrize(
    "command",
    [
        """docker run --entrypoint /bin/bash vllm/vllm-openai:latest -c "vllm serve M -dp 8 -ep" """,
        """docker run IMAGE bash -c "cd /x && exec vllm serve M -dp 8 -ep" """,
        """bash -c "python3 -m sglang.launch_server --model-path M --ep 8" """,
        """ssh host "bash -c 'vllm serve M -dp 8 -ep'" """,
        """ssh host "docker run vllm/vllm-openai:latest M -dp 8 -ep" """,
    ],
)
def test_a_launch_inside_a_quoted_word_is_refused(command: str) -> None:
    with pytest.raises(LaunchError, match="the launch is inside this quoted word; give it alone, and unquoted"):
        rewrite_command(shlex.split(command))


def test_a_quoted_word_beside_the_engine_is_no_launch() -> None:
    words = shlex.split("""vllm serve M -ep --served-model-name "vllm serve M" "it's" """)
    assert rewrite_command(words).words == [word for word in words if word != "-ep"]


def test_a_command_given_as_one_word_is_split() -> None:
    words = ["vllm", "serve", "a b", "-ep"]
    assert command_words(["vllm serve 'a b' \\\n -ep\n"]) == words
    assert command_words(words) == words
    assert command_words(["ls"]) == ["ls"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cd /x && vllm serve M -ep", "'&' in a quoted command is for a shell"),
        ("vllm serve $MODEL -ep", "'\\$' in a quoted command is for a shell"),
        ("vllm serve 'M -ep", "No closing quotation"),
    ],
)
def test_a_quoted_command_that_only_a_shell_can_split_is_refused(command: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        command_words([command])


def test_assignments_before_the_engine_stay_assignments() -> None:
    words = ["NCCL_X=a b", "_Y=1", "Z=", "1X=a b", "vllm", "serve", "M", "X=a b"]
    assert shell_line(words) == "NCCL_X='a b' _Y=1 Z= '1X=a b' vllm serve M 'X=a b'"
    assert shlex.split(shell_line(words)) == words


@pytest.mark.parametrize(
    "before",
    [
        "VLLM_DP_SIZE=2",
        "env VLLM_DP_SIZE=16",
        "docker run -e VLLM_DP_SIZE=2 IMAGE",
        "docker run --env=VLLM_DP_SIZE=2 IMAGE",
    ],
)
def test_a_process_per_data_parallel_rank_is_refused(before: str) -> None:
    with pytest.raises(LaunchError, match=r"VLLM_DP_SIZE=\d+ starts one process per data-parallel rank.*Unset it"):
        rewrite_command(shlex.split(f"{before} vllm serve M -ep -tp 4"))


@pytest.mark.parametrize(
    "command",
    [
        "VLLM_DP_SIZE=1 vllm serve M -ep -tp 4",
        "VLLM_DP_SIZE=0 vllm serve M -ep -tp 4",
        "MY_VLLM_DP_SIZE=2 vllm serve M -ep -tp 4",
        "VLLM_DP_SIZE=2 vllm serve M -tp 4",
        "VLLM_DP_SIZE=2 sglang serve M --ep 4 --tp 4",
    ],
)
def test_other_launches_are_not_refused_for_a_process_per_rank(command: str) -> None:
    rewrite_command(shlex.split(command))


@pytest.mark.parametrize("given", [[], ["--mm-encoder-tp-mode", "data"]])
def test_an_image_encoder_whose_heads_do_not_divide_encodes_whole_images(given: list[str]) -> None:
    words = ["vllm", "serve", "M", "-dp", "8", "-ep", *given]
    for heads, more in ((12, ["--mm-encoder-tp-mode", "data"]), (16, given)):
        rewritten = rewrite_command(words, config={"vision_config": {"num_heads": heads}})
        assert rewritten.words[3:] == [*given, "--tensor-parallel-size", "8", *([] if given else more)]
