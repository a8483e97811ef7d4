"""Which of the timed configs ship."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from kernel_choice import Candidate, chosen

from ep2tp.kernels.configs import KernelConfig, PassConfig, to_json
from tests.benchmarks.kernel_timing import SHAPES

SHAPE = SHAPES["dsv3-tp8"]
EXACT = KernelConfig(PassConfig(64, 128, 4, 3), PassConfig(64, 128, 4, 3), False, False)
ROUNDED = replace(EXACT, gate_up=replace(EXACT.gate_up, input_bits=8))
Timed = dict[int, tuple[float | None, float | None]]  # by tokens, with inputs of 16 and of 8 bits


def shipped(timed: Timed, theirs: dict[int, float], own: dict[int, Any] | None = None) -> list[tuple[int, int]]:
    """(tokens, bits of the first pass' inputs) of what ships."""
    candidates = {
        tokens: {
            bits: Candidate(seconds, config)
            for bits, config, seconds in ((16, EXACT, pair[0]), (8, ROUNDED, pair[1]))
            if seconds is not None
        }
        for tokens, pair in timed.items()
    }
    lines = [
        {"shape": SHAPE.name, "tokens": tokens, "vllm": {"seconds": seconds}, **((own or {}).get(tokens, {}))}
        for tokens, seconds in theirs.items()
    ]
    return [(tokens, one.config.gate_up.input_bits) for tokens, one in chosen(SHAPE, candidates, lines)]


def test_exact_inputs_come_first_even_if_rounded_ones_are_faster() -> None:
    assert shipped({1: (0.9, 0.5)}, {1: 1.0}) == [(1, 16)]


def test_rounded_inputs_ship_where_only_they_are_faster_than_vllm() -> None:
    assert shipped({1: (1.1, 0.9), 2: (0.5, None)}, {1: 1.0, 2: 1.0}) == [(1, 8), (2, 16)]


def test_a_table_ends_where_vllm_is_faster_or_was_not_timed() -> None:
    assert shipped({1: (0.5, None), 2: (1.1, 1.2), 4: (0.5, None)}, {1: 1.0, 2: 1.0, 4: 1.0}) == [(1, 16)]
    assert shipped({1: (0.5, None), 2: (0.5, None)}, {1: 1.0}) == [(1, 16)]


def test_times_of_another_run_need_a_margin() -> None:
    assert shipped({1: (0.99, None)}, {1: 1.0}) == []
    own = {1: {"ep2tp": {"seconds": 0.99, "config": to_json(EXACT)}}}
    assert shipped({1: (1.5, None)}, {1: 1.0}, own) == [(1, 16)]


def test_a_config_of_more_tokens_stands_in_and_is_listed_once() -> None:
    assert shipped({4: (0.99, None)}, {1: 1.0, 2: 1.0, 4: 2.0}) == [(4, 16)]
    assert shipped({4: (1.5, None)}, {1: 1.0, 2: 1.0, 4: 2.0}) == []
