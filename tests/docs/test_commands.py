"""The commands of the documentation have options that exist: ep2tp's own, and the engines' in the versions named."""

from __future__ import annotations

import ast
import re
import shlex

import click
import pytest

from docs.generate.__main__ import ROOT
from ep2tp.cli import main
from tests.engines import wheel_sources
from tests.engines.wheel_sources import NoIndexError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STARTS = re.compile(r"^(?:\s{4,}|\$ )?((?:[A-Z0-9_]+=\S+ )*(ep2tp [a-z]+\b|vllm serve|sglang serve) .*)$")
VLLM = "vllm.engine.arg_utils"
SGLANG = "sglang.srt.arg_groups.fields."
SOURCES = {  # where an engine version defines its options
    ("vllm", "0.25.1"): (VLLM, "vllm.entrypoints.openai.cli_args"),
    ("vllm", "0.33.0"): (VLLM, "vllm.entrypoints.common.cli_args"),
    ("sglang", "0.5.17"): ("sglang.srt.server_args",),
    ("sglang", "0.5.23"): (f"{SGLANG}parallel", f"{SGLANG}exec_", f"{SGLANG}model", f"{SGLANG}schedule"),
}


def commands(program: str) -> set[str]:
    """Every command line of a program in a code block, continuation lines joined, without comments."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if (match := STARTS.match(line)) and match.group(2).startswith(program):
                found.add(line[line.index(program) :].split(" #")[0].strip())
    return found


def options(line: str) -> set[str]:
    words = shlex.split(line.replace("[", " ").replace("]", " "))
    return {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}


def own_options(name: str) -> set[str]:
    return {option for parameter in main.commands[name].params for option in (*parameter.opts, "--help")}


def test_commands_of_ep2tp_exist() -> None:
    lines = {line for line in commands("ep2tp ") if line.split()[1] in main.commands}
    assert len(lines) > 15
    for line in lines:
        name = line.split()[1]
        assert isinstance(main.commands[name], click.Command)
        assert options(line.partition(" -- ")[0]) <= own_options(name), line


def test_an_option_that_does_not_exist_is_noticed() -> None:
    assert not options("ep2tp plan MODEL --gpus 2 --gpu-count 3") <= own_options("plan")


def flags(engine: str, version: str) -> set[str]:
    """What an engine's sources hold: literal flags, and fields from which it derives them."""
    found = set()
    for name in SOURCES[engine, version]:
        try:
            tree = wheel_sources.module(engine, version, name)
        except NoIndexError as error:
            pytest.skip(f"needs a package index: {error}")
        assert tree is not None, f"{engine} {version} has no {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                found.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(f"--{node.target.id.replace('_', '-')}")
    return found


@pytest.mark.parametrize(("engine", "version"), SOURCES)
def test_options_of_the_engines_exist(engine: str, version: str) -> None:
    lines = commands(f"{engine} serve")
    assert len(lines) > 10
    asked = {option for line in lines for option in options(line)} - {"--tp"}  # argparse completes it to --tp-size
    assert asked - flags(engine, version) == set()
