"""The two commands: what they print, and their exit codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from ep2tp.checkpoint import sample
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
    planned = json.loads(text)
    assert code == 0 and planned["status"] == "planned" and planned["estimated_seconds"] > 0
    assert planned["bytes"] < planned["disk_needed"] < planned["disk_free"]
    code, text = run(reshard_command, source, out, "--tp", "2", "--json")
    assert code == 0 and json.loads(text)["fields"]["intermediate_size"] == [448, 512]
    assert run(reshard_command, source, out, "--tp", "2", "--quiet") == (0, "")
    code, text = run(verify_command, out, "--source", source)
    assert code == 0 and "bit for bit" in text
    with (tmp_path / "out" / "config.json").open("a") as file:
        file.write(" ")
    code, text = run(verify_command, out, "--json")
    assert code == 3 and "config.json" in json.loads(text.splitlines()[0])["difference"]


def test_every_difference_is_named(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(reshard_command, source, str(out), "--tp", "2")[0] == 0
    weights = sorted(out.glob("*.safetensors"))[0]
    for path in (weights, out / "config.json"):
        path.unlink()
        path.mkdir()
    code, text = run(verify_command, str(out), "--json")
    found = json.loads(text.splitlines()[0])
    assert code == 3 and found["difference"] == found["differences"][0]
    assert [line.partition(":")[0] for line in found["differences"]] == [str(weights), str(out / "config.json")]
    (out / "ep2tp.json").unlink()
    (out / "ep2tp.json").mkdir()
    code, text = run(verify_command, str(out), "--json")
    failed = json.loads(text.splitlines()[0])
    assert code == 1 and failed["status"] == "failed" and "ep2tp.json: cannot be read" in failed["error"]


def test_the_config_of_a_source_that_has_none(source: str, tmp_path: Path) -> None:
    bare, out, config = tmp_path / "bare", tmp_path / "out", str(tmp_path / "config.json")
    shutil.copytree(source, bare)
    (bare / "config.json").rename(config)
    code, text = run(reshard_command, str(bare), str(out), "--tp", "2")
    assert code == 1 and "has no config.json; name the original's with --config" in text
    assert run(reshard_command, str(bare), str(out), "--tp", "2", "--config", config)[0] == 0
    expected = tmp_path / "expected"
    assert run(reshard_command, source, str(expected), "--tp", "2")[0] == 0
    assert (out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    code, text = run(verify_command, str(out), "--source", str(bare), "--config", config)
    assert code == 0 and "bit for bit" in text
    assert run(verify_command, str(out), "--source", str(bare))[0] == 1


def test_a_config_beside_the_sources_own_is_refused(source: str, tmp_path: Path) -> None:
    out, config, other = str(tmp_path / "out"), str(Path(source) / "config.json"), tmp_path / "hostname"
    code, text = run(reshard_command, source, out, "--tp", "2", "--config", config)
    assert code == 2 and "has its own; leave --config out" in text and not Path(out).exists()
    other.write_text("machine\n")
    code, text = run(reshard_command, source, out, "--tp", "2", "--config", str(other), "--dry-run")
    assert code == 1 and f"{other}: " in text
    assert run(reshard_command, source, out, "--tp", "2")[0] == 0
    code, text = run(verify_command, out, "--source", source, "--config", config)
    assert code == 2 and "has its own; leave --config out" in text
    code, text = run(verify_command, out, "--config", config)
    assert code == 2 and "--source" in text


@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_heads_that_do_not_divide(tmp_path: Path, more: tuple[str, ...]) -> None:
    source, out = str(Model("fp8_block_f32", heads=4).write(tmp_path / "source")), str(tmp_path / "out")
    problem = "4 attention heads and 4 key-value heads do not divide over 6 tensor-parallel ranks"
    code, text = run(reshard_command, source, out, "--tp", "6", "--layout", "ranks", *more)
    assert code == 1 and problem in text and "Sizes up to 6 that work: 1, 2, 4;" in text
    assert not Path(out).exists()
    code, text = run(reshard_command, source, out, "--tp", "6", *more)
    assert code == 0 and f"Warning: {problem}" in text and "(DEP) 6 ranks may load it" in text
    code, text = run(reshard_command, source, out, "--tp", "6", *more, "--json")
    assert code == 0 and problem in json.loads(text)["warnings"][0]
    code, text = run(reshard_command, source, str(tmp_path / "even"), "--tp", "2", *more, "--json")
    assert code == 0 and json.loads(text)["warnings"] == []


def test_a_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    source, out = str(Model("bf16", size=704).write(tmp_path / "source")), str(tmp_path / "out")
    code, text = run(reshard_command, source, out, "--tp", "11")
    assert code == 0 and "420 key-value heads and 26880 vocabulary rows do not divide" in text


def test_exit_codes(source: str, tmp_path: Path) -> None:
    code, text = run(reshard_command, str(tmp_path / "nowhere"), str(tmp_path / "out"), "--tp", "2")
    assert code == 1 and "no such folder" in text
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "2", "--finish")
    assert code == 2
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "1")
    assert code == 0 and "Nothing to pad" in text and not (tmp_path / "out").exists()
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "2", "--layout", "ranks", "--ranks", "0-x")
    assert code == 2


@pytest.mark.parametrize("ranks", ["0-x", "1-2-9", "3-1", "", "-1", "0,", "0-99999999999"])
def test_ranks_that_mean_nothing(source: str, tmp_path: Path, ranks: str) -> None:
    code, text = run(reshard_command, source, str(tmp_path), "--tp", "4", "--layout", "ranks", f"--ranks={ranks}")
    assert code == 2 and "write ranks as 0-3" in text


def test_ranks_that_mean_something(source: str, tmp_path: Path) -> None:
    words = (source, str(tmp_path / "out"), "--tp", "4", "--layout", "ranks", "--ranks", "0,2-3")
    assert run(reshard_command, *words)[0] == 0
    folders = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert folders == {"rank-0-of-4", "rank-2-of-4", "rank-3-of-4", "shared"}


def test_errors_as_json(source: str, tmp_path: Path) -> None:
    code, text = run(reshard_command, str(tmp_path / "nowhere"), str(tmp_path / "out"), "--tp", "2", "--json")
    failed = json.loads(text.splitlines()[0])
    assert code == 1 and failed["status"] == "failed" and "no such folder" in failed["error"]
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "2", "--json", "--stream")
    failed = json.loads(text.splitlines()[0])
    assert code == 2 and failed["status"] == "failed" and "stream is for models on the hub" in failed["error"]
    code, text = run(verify_command, str(tmp_path), "--json")
    assert code == 1 and "no finished conversion" in json.loads(text.splitlines()[0])["error"]


def test_a_sample_that_cannot_be_written(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sample.os, "fsync", fsync)
    code, text = run(reshard_command, source, str(tmp_path / "out"), "--tp", "2", "--dry-run")
    assert code == 1 and f"{tmp_path}: No space left on device while a sample was measured" in text
