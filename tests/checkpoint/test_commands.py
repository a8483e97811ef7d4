"""The two commands: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ep2tp.checkpoint.commands import reshard_command, verify_command
from tests.checkpoint.checkpoints import Model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(Model("fp8_block_f32").write(tmp_path_factory.mktemp("models") / "source"))


def run(command: object, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, words)  # type: ignore[arg-type]
    return result.exit_code, result.output


def test_convert_and_verify(source: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, text = run(reshard_command, source, out, "--tp", "2", "--dry-run")
    assert code == 0 and "moe_intermediate_size 192 -> 256" in text and "nothing was written" in text
    code, text = run(reshard_command, source, out, "--tp", "2", "--dry-run", "--json")
    assert code == 0 and json.loads(text)["status"] == "planned" and json.loads(text)["estimated_seconds"] > 0
    code, text = run(reshard_command, source, out, "--tp", "2", "--json")
    assert code == 0 and json.loads(text)["fields"]["intermediate_size"] == [448, 512]
    assert run(reshard_command, source, out, "--tp", "2", "--quiet") == (0, "")
    code, text = run(verify_command, out, "--source", source)
    assert code == 0 and "bit for bit" in text
    with (tmp_path / "out" / "config.json").open("a") as file:
        file.write(" ")
    code, text = run(verify_command, out, "--json")
    assert code == 3 and "config.json" in json.loads(text.splitlines()[0])["difference"]


def test_exit_codes(source: str, tmp_path: Path) -> None:
    code, text = run(reshard_command, str(tmp_path / "nowhere"), str(tmp_path / "out"), "--tp", "2")
    assert code == 1 and "no such folder" in text
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "2", "--finish")
    assert code == 2
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "1")
    assert code == 0 and "Nothing to pad" in text and not (tmp_path / "out").exists()
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "2", "--layout", "ranks", "--ranks", "0-x")
    assert code == 2
