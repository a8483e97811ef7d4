"""``ep2tp detect`` as a command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from ep2tp.cli import main
from tests.observe.recordings import LOGS

TP, TEP, DEP = (
    str(LOGS / f"vllm-0.32.0-{name}.log") for name in ("tep2-rewritten", "tep2-crashes", "dep2-crashes")
)  # fmt: skip


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["detect", *words])
    return result.exit_code, result.stdout, result.stderr


def test_json_has_exactly_these_keys() -> None:
    status, out, _ = run("--json", TP)
    assert status == 0
    value = json.loads(out)
    assert value.keys() == {"plan", "engine", "confidence", "evidence"}
    assert (value["plan"], value["engine"], value["confidence"]) == ("TP", "vllm", "high")
    assert all(piece.keys() == {"line", "text", "says"} for piece in value["evidence"])
    assert any("overruled by line" in piece["says"] for piece in value["evidence"])


@pytest.mark.parametrize(
    ("expect", "source", "status"),
    [("tp", TP, 0), ("tp", TEP, 3), ("tp,tep", TEP, 0), ("TEP", TEP, 0), ("dep", DEP, 0), ("tp,tep", DEP, 3)],
)
def test_a_gate_for_ci(expect: str, source: str, status: int) -> None:
    assert run("--expect", expect, source)[0] == status


def test_what_cannot_be_told_fails_the_gate_unless_all_that_fits_is_accepted(tmp_path: Path) -> None:
    call = "h:1:2 [0] NCCL INFO AllReduce: opCount 1 sendbuff 0x7 recvbuff 0x7 count 9 datatype 9 op 0 root 0 comm 0xa [nranks=2] stream 0x1\n"  # noqa: E501
    (tmp_path / "nccl.log").write_text(call * 9)
    source = str(tmp_path / "nccl.log")
    assert run("--expect", "tp", source)[0] == 3
    assert "found unknown: TP or TEP" in run("--expect", "tp", source)[2]
    assert run("--expect", "tp,tep", source)[0] == 0
    status, out, _ = run("--expect", "tep", source, TEP)  # the boot log settles it
    assert status == 0
    assert re.search(rf"line \d+: {TEP}: .*\[EP Rank", out)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["/nowhere/boot.log"], 1, "/nowhere/boot.log: cannot be read (No such file or directory)"),
        (["/"], 1, "cannot be read"),
        (["--expect", "ep", TP], 2, "ep: use tp, tep, dep, mixed"),
        ([], 2, "Missing argument"),
        (["-", TP, "-"], 2, "-: standard input can be read only once"),
        (["http://127.0.0.1:notaport"], 1, "http://127.0.0.1:notaport: not a server's URL (Port could not be cast"),
        (["http://[::1"], 1, "http://[::1: not a server's URL (Invalid IPv6 URL)"),
        (["http://"], 1, "http://: not a server's URL"),
        (["http://127.0.0.1:80/a b"], 1, "http://127.0.0.1:80/a b: not a server's URL"),
        (["http://127.0.0.1:99999"], 1, "not a server's URL (Port out of range"),
    ],
)
def test_errors(words: list[str], status: int, message: str) -> None:
    code, _, err = run(*words)
    assert code == status
    assert message in err


def test_a_log_of_something_else_says_what_it_expected(tmp_path: Path) -> None:
    (tmp_path / "other.log").write_text("nginx started\n")
    status, out, _ = run(str(tmp_path / "other.log"))
    assert status == 0
    assert out.startswith("unknown")
    assert "Is it a log of vLLM" in out
