"""Which of the timed configs ship, and that a missing one leaves the engine its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from kernel_choice import Candidate, chosen, write_tables

from ep2tp.kernels import configs
from ep2tp.kernels.configs import KernelConfig, PassConfig, choose, to_json
from tests.benchmarks.kernel_timing import SHAPES

SHAPE = SHAPES["dsv3-tp8"]
DEVICE = "NVIDIA H100 80GB HBM3"
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
    assert shipped({4: (0.97, None)}, {1: 1.0, 2: 1.0, 4: 2.0}) == [(4, 16)]
    assert shipped({4: (0.99, None)}, {1: 1.0, 2: 1.0, 4: 2.0}) == []
    assert shipped({4: (1.5, None)}, {1: 1.0, 2: 1.0, 4: 2.0}) == []


@pytest.fixture
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for tables with nothing in it."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "configs")
    configs._cached_table.cache_clear()
    yield tmp_path / "configs"
    configs._cached_table.cache_clear()


def sweep(*timed: tuple[int, KernelConfig, float, float]) -> dict[str, Any]:
    """What kernel_sweep.py writes: tokens, config, seconds, error."""
    results = [
        {"shape": SHAPE.name, "tokens": tokens, "pass": "both", "config": to_json(config), "seconds": s, "error": error}
        for tokens, config, s, error in timed
    ]
    return {"device": DEVICE, "torch": "2", "triton": "3", "results": results}


def test_the_fastest_right_result_of_all_sweeps_and_tables_ships(no_tables: Path) -> None:
    slower, wrong = replace(EXACT, pairs=8), replace(EXACT, pairs=32)
    write_tables([sweep((1, slower, 30e-6, 2e-3), (1, EXACT, 20e-6, 2e-3), (8, wrong, 1e-6, 0.5))], None)
    configs._cached_table.cache_clear()
    assert [choose(DEVICE, SHAPE.key, SHAPE.format, tokens) for tokens in (1, 2)] == [EXACT, None]
    write_tables([sweep((1, slower, 25e-6, 2e-3), (8, slower, 90e-6, 2e-3))], None)
    configs._cached_table.cache_clear()
    assert [choose(DEVICE, SHAPE.key, SHAPE.format, tokens) for tokens in (1, 2, 9)] == [EXACT, slower, None]
    assert choose("another", SHAPE.key, SHAPE.format, 1) is None
    assert choose(DEVICE, (128, *SHAPE.key[1:]), SHAPE.format, 1) is None


def test_inputs_in_fp8_may_be_further_off(no_tables: Path) -> None:
    timed = sweep((1, ROUNDED, 20e-6, 4e-2), (1, EXACT, 90e-6, 4e-2))
    write_tables([timed], {"lines": [{"shape": SHAPE.name, "tokens": 1, "vllm": {"seconds": 50e-6}}]})
    assert choose(DEVICE, SHAPE.key, SHAPE.format, 1) == ROUNDED
