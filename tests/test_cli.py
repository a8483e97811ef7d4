from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ep2tp.cli import main
from ep2tp.demo.tiny import TinyModel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TinyModel(expert_size=1408, heads=16).config()))
    return tmp_path


def run(*words: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, words, env={"COLUMNS": "200", **(environment or {})})
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_command() -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("patches", "plan", "rewrite", "demo", "detect", "doctor"):
        assert command in out


def test_patches_are_listed() -> None:
    status, out, _ = run("patches")
    assert status == 0
    assert "deepseek_v3" in out
    assert "GlmMoeDsaForCausalLM" in out


def test_a_selection_of_patches_is_listed() -> None:
    _, out, _ = run("patches", environment={"EP2TP_PATCHES": "qwen3_moe"})
    assert "qwen3_moe" in out
    assert "deepseek_v3" not in out


def test_a_model_is_matched_with_the_reason_and_its_slices(model: Path) -> None:
    status, out, _ = run("patches", "--model", str(model), "--tp", "8")
    assert status == 0
    for part in ("patch deepseek_v3", "by model_type deepseek_v3", "moe_intermediate_size", "176"):
        assert part in out


def test_rewrite_prints_the_command_alone_on_stdout(model: Path) -> None:
    status, out, err = run("rewrite", "--", "vllm", "serve", str(model), "-dp", "4", "-ep")
    assert status == 0
    assert out == f"vllm serve {model} --tensor-parallel-size 4\n"
    assert "folded into tensor parallelism" in err


def test_rewrite_checks_the_model(model: Path) -> None:
    status, _, err = run("rewrite", "--", "vllm", "serve", str(model), "-dp", "3", "-ep")
    assert status == 1
    assert "Sizes up to 3 that work: 1, 2" in err


def test_rewrite_says_where_the_plugin_is_needed(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    _, _, err = run("rewrite", "--", "vllm", "serve", str(model), "-tp", "2", "-ep")
    assert "does not divide into whole blocks over 2 ranks" in err


@pytest.mark.parametrize("flag", ["-dph", "-h"])
def test_rewrite_takes_no_flag_after_the_first_word(flag: str) -> None:
    _, out, err = run("rewrite", "vllm", "serve", "-tp", "8", flag)
    assert "Usage" not in out + err
    assert out == f"vllm serve -tp 8 {flag}\n"


def test_rewrite_keeps_the_dashes_of_another_program() -> None:
    _, out, _ = run("rewrite", "uv", "run", "--", "vllm", "serve", "-ep", "-tp", "8")
    assert out == "uv run -- vllm serve -tp 8\n"


def test_rewrite_takes_a_quoted_command() -> None:
    status, out, _ = run("rewrite", "X='a b' vllm serve -dp 8 -ep")
    assert (status, out) == (0, "X='a b' vllm serve --tensor-parallel-size 8\n")


def test_rewrite_checks_a_model_after_a_setting(model: Path) -> None:
    status, _, err = run("rewrite", "--", "vllm", "serve", "-dp", "3", "-ep", str(model))
    assert status == 1
    assert "Sizes up to 3 that work: 1, 2" in err


def test_rewrite_says_that_it_did_not_find_the_model(model: Path) -> None:
    status, _, err = run("rewrite", "--", "vllm", "serve", "-dp", "3", "-ep", "--port", "80", str(model))
    assert status == 0
    assert "the model's name was not found in the command (put it right after 'serve')" in err


def test_rewrite_leaves_a_model_without_experts_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = ["vllm", "serve", str(tmp_path), "-dp", "4", "-ep"]
    status, out, err = run("rewrite", "--", "X=a b", *words)
    assert (status, out) == (0, f"X='a b' {' '.join(words)}\n")
    assert "names no routed experts (model_type 'llama'); nothing changed" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["patches", "--model", "/nowhere"], "/nowhere: no such file or folder"),
        (["rewrite", "--", "ls"], "starts neither vLLM nor SGLang"),
    ],
)
def test_errors_are_one_line_without_a_traceback(words: list[str], message: str) -> None:
    status, _, err = run(*words)
    assert status == 1
    assert message in err
    assert "Traceback" not in err


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, _, err = run("patches", "--model", str(tmp_path))
    assert status == 1
    assert "names no routed experts" in err


def test_a_patch_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\nexperts = 3\n')
    status, _, err = run("patches", environment={"EP2TP_PATCH_PATH": str(tmp_path)})
    assert status == 1
    assert f"{tmp_path / 'mine.toml'}: does not follow the patch format" in err
    assert "experts: Extra inputs are not permitted" in err


def test_no_colour_codes_when_piped(model: Path) -> None:
    command = [sys.executable, "-m", "ep2tp", "patches", "--model", str(model)]
    piped = subprocess.run(command, capture_output=True, env=os.environ | {"COLUMNS": "80"}, check=True)
    assert b"\x1b" not in piped.stdout
