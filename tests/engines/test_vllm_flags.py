"""``ep2tp rewrite`` takes no option of the installed vLLM for an abbreviation of another."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("vllm")

from vllm.benchmarks.throughput import add_cli_args
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ep2tp.commands.rewrite import full_flags
from ep2tp.engines.vllm.arguments import RULES


def refused(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    return {option: full for option in parser._option_string_actions if (full := full_flags(option, RULES))}


def test_no_option_of_vllm_serve_is_refused() -> None:
    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    assert "--enable-expert-parallel" in parser._option_string_actions
    assert "--api-server-count" in parser._option_string_actions
    assert refused(parser) == {}


def test_no_option_of_an_engine_is_refused() -> None:
    assert refused(EngineArgs.add_cli_args(FlexibleArgumentParser())) == {}


def test_no_option_of_a_benchmark_is_refused() -> None:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    assert "--n" in parser._option_string_actions
    assert refused(parser) == {}
