"""The command line as a person meets it: help, completion, narrow terminals, pipes, colour."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from ep2tp.cli import main
from ep2tp.demo.tiny import TinyModel
from ep2tp.model.families import load_families
from tests.observe.recordings import LOGS

EP2TP = [sys.executable, "-m", "ep2tp"]
HEAVY = {"torch", "numpy", "triton", "vllm", "sglang", "transformers", "pydantic", "rich", "huggingface_hub"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TinyModel(expert_size=1408, heads=16).config()))
    return tmp_path


def piped(*words: str, columns: int | None = None, **environment: str) -> str:
    width = {"COLUMNS": str(columns)} if columns else {}
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run([*EP2TP, *words], env=kept | width | environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def on_terminal(*words: str, columns: int, **environment: str) -> str:
    """What a command writes to a terminal of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
    environment = kept | {"TERM": "xterm-256color"} | environment
    process = subprocess.Popen([*EP2TP, *words], stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    found = b""
    try:
        while part := os.read(ours, 65536):
            found += part
    except OSError:  # Linux's way to say that the other side is closed
        pass
    finally:
        os.close(ours)
        process.wait()
    return found.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["reshard", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from ep2tp.cli import main
main({words}, standalone_mode=False)
print("IMPORTED", *({HEAVY} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["IMPORTED"]


def test_no_command_is_described_by_half_a_sentence() -> None:
    text = piped("--help", columns=80)
    assert "..." not in text.partition("Commands:")[2]
    for name in main.commands:
        assert re.search(rf"^  {name} +\S.*\.$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["ep2tp", "re"], {"reshard", "rewrite"}),
        (["ep2tp", "plan", "--ca"], {"--calibrate"}),
        (["ep2tp", "reshard", "--layout", ""], {"padded", "ranks"}),
        (["ep2tp", "demo", "--engine", "s"], {"sglang"}),
    ],
)
def test_bash_completes(typed: list[str], expected: set[str], tmp_path: Path) -> None:
    """In a real bash, by the line that docs/shell-completion.md gives."""
    command = tmp_path / "ep2tp"
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from ep2tp.cli import main; main(prog_name=\'ep2tp\')" "$@"\n'
    )
    command.chmod(0o755)
    page = (Path(__file__).parents[1] / "docs" / "shell-completion.md").read_text(encoding="utf-8")
    [line] = [line.strip() for line in page.splitlines() if "bash_source" in line and "eval" in line]
    script = f"""{line}
complete -p ep2tp > /dev/null || exit 1
COMP_WORDS=({" ".join(f"'{word}'" for word in typed)}) COMP_CWORD={len(typed) - 1}
$(complete -p ep2tp | sed -E 's/.*-F ([^ ]+).*/\\1/') ep2tp
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_wider_than_the_terminal(columns: int, model: Path) -> None:
    link = ("--gpus", "8", "--gpu", "RTX PRO 6000", "--link", "pcie5")
    for words in (
        ("--help",),
        ("patches",),
        ("patches", "--model", str(model), "--tp", "8"),
        ("plan", str(model), *link),
        ("plan", str(model), *link, "--batch", "1,2,4,8,16,32,64,128,65536"),
        ("detect", str(LOGS / "vllm-0.32.0-tep2-rewritten.log")),
        ("rewrite", "--", "vllm", "serve", str(model), "-dp", "4", "-ep", "--all2all-backend", "deepep_low_latency"),
    ):
        text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", on_terminal(*words, columns=columns))
        # a launch command is one line, to be copied
        lines = [line for line in text.splitlines() if "vllm serve" not in line and "sglang serve" not in line]
        assert [line for line in lines if len(line.rstrip()) > columns] == []
        assert "…" not in text, f"{words}: cut off"


def test_names_stay_whole_at_80_columns_and_in_pipes() -> None:
    names = {name for family in load_families().values() for name in family.match.architectures}
    for text in (piped("patches"), piped("patches", columns=80)):
        assert {name for name in names if name not in text} == set()
    changes = piped("rewrite", "--", "vllm", "serve", "/nowhere", "-dp", "2", "-ep", columns=80)
    assert "--enable-expert-parallel" in changes


def test_colour_on_a_terminal_unless_it_is_not_wanted(model: Path) -> None:
    words = ("plan", str(model), "--gpus", "2", "--gpu", "RTX PRO 6000", "--link", "pcie5")
    colour = re.compile(r"\x1b\[(?:\d+;)*[39][0-7]m")
    assert colour.search(on_terminal(*words, columns=80))
    assert not colour.search(on_terminal(*words, columns=80, NO_COLOR="1"))
    assert "\x1b" not in piped(*words)
