"""``ep2tp rewrite`` takes no option of the installed SGLang for an abbreviation of another."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("sglang")

from sglang.srt.server_args import ServerArgs

from ep2tp.commands.rewrite import full_flags
from ep2tp.engines.sglang.arguments import RULES


def test_no_option_of_sglang_is_refused() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    options = parser._option_string_actions
    assert "--moe-a2a-backend" in options
    assert {option: full for option in options if (full := full_flags(option, RULES))} == {}
