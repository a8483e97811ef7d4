"""``ep2tp tune`` without a GPU: which slices, which configurations, which files; and that real engines read them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from math import inf
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ep2tp.cli import main
from ep2tp.demo.tiny import TinyModel
from ep2tp.errors import ModelError, SettingError
from ep2tp.kernels import configs, tuned_configs
from ep2tp.kernels.configs import KernelConfig
from ep2tp.kernels.operands import ExpertWeights, WeightFormat
from ep2tp.kernels.search import descend, engine_moves, kernel_moves, runs_or_inf
from ep2tp.kernels.slices import Slice, slice_of
from ep2tp.kernels.tune import Timed, Tuning, tune
from ep2tp.model.families import load_families
from ep2tp.model.locate import facts_of

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = WeightFormat("fp8", (128, 128))
DEVICE = "NVIDIA H100 80GB HBM3"
DEFAULT = configs.default(1, (9, 0))
ENGINE_CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}


def facts(expert_size: int, **more: Any) -> Any:
    config = TinyModel("deepseek_v3", expert_size=expert_size, experts=16, top_k=4, hidden=1024).config() | more
    return facts_of(config, "a model", load_families("all", ()))


def test_a_slice_is_what_a_rank_holds() -> None:
    assert slice_of(facts(2048, quantization_config=FP8), 8) == Slice(16, 1024, 256, 4, BLOCKS)
    padded = slice_of(facts(1536, quantization_config=FP8), 8)  # 12 blocks over 8 ranks: two each
    assert (padded.size, padded.format) == (256, BLOCKS)
    refined = slice_of(facts(1536, quantization_config=FP8), 8, refines=True)
    assert (refined.size, refined.format) == (192, WeightFormat("fp8", (64, 64)))
    assert slice_of(facts(1408), 8) == Slice(16, 1024, 176, 4, WeightFormat("bf16"))
    assert slice_of(facts(2048), 8, fused_shared=1).key == (17, 1024, 256, 5)


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a model: 90 values a rank.* multiples of 16"):
        slice_of(facts(180), 2)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    with pytest.raises(ModelError, match="tune takes"):
        slice_of(facts(2048, quantization_config=gptq), 8)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 39))
def test_descent_ends_at_a_local_minimum_and_measures_nothing_twice(heights: list[int], start: int) -> None:
    start %= len(heights)
    measured: list[int] = []

    def measure(at: int) -> float:
        measured.append(at)
        return heights[at]

    best, least = descend([start], lambda at: [n for n in (at - 1, at + 1) if 0 <= n < len(heights)], measure, inf)
    assert least == heights[best] <= heights[start]
    assert all(heights[n] >= least for n in (best - 1, best + 1) if 0 <= n < len(heights))
    assert len(measured) == len(set(measured))


def test_descent_keeps_to_its_time_and_passes_over_what_does_not_run() -> None:
    assert descend([1, 3], lambda _: count(2), lambda config: 1 / config, time.monotonic() - 1) == (1, 1)
    assert descend([3, 1, 2], lambda _: [], lambda config: config, inf) == (1, 1)
    measure = runs_or_inf(lambda config: 1 // config, (ZeroDivisionError,))
    assert descend([0], lambda _: [1], measure, inf) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        descend([0], lambda _: [], runs_or_inf(lambda config: 1 // config, (ValueError,)), inf)


@pytest.mark.parametrize("tokens", [1, 64])
def test_moves_change_one_choice_of_the_kernel(tokens: int) -> None:
    start = configs.default(tokens, (9, 0))
    found = list(kernel_moves(start, True))
    assert len(found) == len(set(found)) > 20
    slices = 0
    for config in found:
        flat, before = flattened(config), flattened(start)
        changed = {name for name in before if flat[name] != before[name]}
        if any("slices" in name for name in changed):
            name = changed.pop().partition(".")[0]
            tile, was = getattr(config, name), getattr(start, name)
            assert tile.rows * tile.columns == was.rows * was.columns and tile.columns == was.columns * tile.slices
            slices += 1
        else:
            assert len(changed) == 1
    assert slices == (
        0 if tokens == 1 else 4
    )  # 32 rows of the first pass in two, 128 of the second in two, four, eight


def test_launches_overlap_only_where_the_gpu_can() -> None:
    start = configs.default(1, (8, 9))
    assert any(config.overlap for config in kernel_moves(start, True))
    assert not any(config.overlap for config in kernel_moves(start, False))


@pytest.mark.parametrize("name", ["CompilationError", "OutOfResources", "PTXASError"])
def test_what_triton_raises_for_a_config_is_passed_over(name: str) -> None:
    from triton.compiler import errors as compiler
    from triton.runtime import errors as runtime

    from ep2tp.kernels.timing import launch_errors

    assert issubclass(getattr(runtime, name, None) or getattr(compiler, name), launch_errors())


def test_slices_can_be_changed_and_taken_back() -> None:
    start = configs.default(64, (9, 0))
    start = replace(start, down=replace(start.down, rows=32, columns=512, slices=4))
    found = {config.down.slices: config.down for config in kernel_moves(start, True) if config.down.slices != 4}
    assert {slices: (down.rows, down.columns) for slices, down in found.items()} == {
        1: (128, 128), 2: (64, 256), 8: (16, 1024)
    }  # fmt: skip


def flattened(config: KernelConfig) -> dict[str, Any]:
    fields = configs.to_json(config)
    passes = {f"{name}.{key}": value for name in ("gate_up", "down") for key, value in fields.pop(name).items()}
    return fields | passes


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize(("weight_bytes", "block"), [(1, (128, 128)), (1, (64, 64)), (2, (0, 0))])
def test_the_engines_space_has_only_what_runs(tokens: int, weight_bytes: int, block: tuple[int, int]) -> None:
    moves = engine_moves(tokens, weight_bytes, block)
    start = ENGINE_CONFIG | {"BLOCK_SIZE_K": 64}
    reached, new = [], [start]
    while new:
        reached += new
        new = [c for c in {json.dumps(c): c for r in new for c in moves(r)}.values() if c not in reached]
    assert len(reached) > 30
    for config in reached[1:]:
        assert config["BLOCK_SIZE_M"] <= max(16, 2 * tokens)
        assert not block[1] or block[1] % config["BLOCK_SIZE_K"] == 0
        tile = config["BLOCK_SIZE_K"] * (config["BLOCK_SIZE_M"] + config["BLOCK_SIZE_N"])
        assert config["num_stages"] * tile * weight_bytes <= 227 * 1024


def timed(tokens: int, ours: float, engine: float = 2.0) -> Timed:
    return Timed(tokens, DEFAULT, ours, ENGINE_CONFIG, engine, 3.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned_configs._read_cached.cache_clear()
    return tmp_path / "ep2tp" / "configs"


def test_a_launch_reads_the_table_that_was_written(cache: Path) -> None:
    tuning = Tuning(
        Slice(256, 7168, 256, 8, BLOCKS), DEVICE, "vllm", [timed(1, 1.0), timed(4, 1.9), timed(16, 2.1), timed(64, 1)]
    )
    own, theirs = tuning.write(cache, Path("file.json"))
    assert own == cache / "vllm" / "NVIDIA_H100_80GB_HBM3-fp8-128x128.json"
    chosen = [tuned_configs.choose("vllm", DEVICE, (256, 7168, 256, 8), BLOCKS, tokens) for tokens in (1, 3, 4, 5, 64)]
    assert chosen == [DEFAULT, DEFAULT, DEFAULT, None, None]  # only up to where the engine's kernel first wins
    assert json.loads(theirs.read_text()) == {str(tokens): ENGINE_CONFIG for tokens in (1, 4, 16, 64)}
    assert theirs == cache / "vllm" / "file.json"


def test_what_ships_stays_where_tuning_was_interrupted(cache: Path) -> None:
    """A table ends where the engine's kernel was seen to be faster, not where time was up."""
    shape, key = Slice(256, 7168, 256, 8, BLOCKS), (256, 7168, 256, 8)
    shipped = configs.shipped(DEVICE, key, BLOCKS)
    assert [most for most, _ in shipped] == [1, 2, 4, 8, 16, 32, 64]
    assert Tuning(shape, DEVICE, "vllm", [timed(1, 1.0)]).table() == {key: [(1, DEFAULT), *shipped[1:]]}
    assert Tuning(shape, DEVICE, "vllm", [timed(1, 1.0), timed(2, 3.0)]).table() == {key: [(1, DEFAULT)]}
    assert Tuning(shape, DEVICE, "sglang", [timed(1, 1.0)]).table() == {key: [(1, DEFAULT)]}  # not compared with it


def test_a_table_is_of_one_engine(cache: Path) -> None:
    shape, key = Slice(256, 7168, 256, 8, BLOCKS), (256, 7168, 256, 8)
    Tuning(shape, DEVICE, "vllm", [timed(1, 3.0)]).write(cache, Path("file.json"))
    Tuning(shape, DEVICE, "sglang", [timed(1, 1.0)]).write(cache, Path("file.json"))
    chosen = {engine: tuned_configs.choose(engine, DEVICE, key, BLOCKS, 1) for engine in ("vllm", "sglang")}
    assert chosen == {"vllm": None, "sglang": DEFAULT}
    assert tuned_configs.choose("sglang", DEVICE, key, BLOCKS, 64) is None
    assert tuned_configs.choose("sglang", DEVICE, (384, 7168, 256, 8), BLOCKS, 1) is None
    assert tuned_configs.choose("sglang", DEVICE, (384, 7168, 256, 8), BLOCKS, 1, is_forced=True) is not None


def test_nothing_wins_against_a_kernel_that_did_not_run() -> None:
    assert not timed(4096, 9.0, engine=inf).wins
    assert not timed(4096, inf, engine=inf).wins


def test_a_table_keeps_other_shapes_and_replaces_its_own(cache: Path) -> None:
    path = cache / "table.json"
    first, second = (8, 64, 32, 2), (8, 64, 48, 2)
    tuned_configs.write_table(path, {first: [(4, DEFAULT)], second: []})
    tuned_configs.write_table(path, {first: [(8, DEFAULT)]})
    assert tuned_configs.read_table(path) == {first: [(8, DEFAULT)], second: []}
    assert [file.name for file in cache.iterdir()] == ["table.json"]


def test_a_shape_at_which_the_engine_won_hides_the_table_that_ships(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "choose", lambda *_: DEFAULT)
    key = (8, 64, 32, 2)
    assert tuned_configs.choose("vllm", DEVICE, key, BLOCKS, 1) == DEFAULT
    tuned_configs.write_table(cache / "vllm" / configs.file_name(DEVICE, str(BLOCKS)), {key: []})
    tuned_configs._read_cached.cache_clear()
    assert tuned_configs.choose("vllm", DEVICE, key, BLOCKS, 1) is None
    assert tuned_configs.choose("vllm", DEVICE, (8, 64, 48, 2), BLOCKS, 1) == DEFAULT


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shapes": [{"E": 1}]}', '{"shapes": 3}'])
def test_a_damaged_table_is_named(cache: Path, text: str) -> None:
    path = cache / "vllm" / configs.file_name(DEVICE, str(BLOCKS))
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(SettingError, match=r"vllm/\S+fp8-128x128\.json: .*delete it and tune again"):
        tuned_configs.choose("vllm", DEVICE, (8, 64, 32, 2), BLOCKS, 1)


def test_a_table_that_may_not_be_read_is_named(cache: Path) -> None:
    path = cache / "vllm" / configs.file_name(DEVICE, str(BLOCKS))
    path.mkdir(parents=True)
    with pytest.raises(SettingError, match=r"fp8-128x128\.json: cannot be read \(Is a directory"):
        tuned_configs.choose("vllm", DEVICE, (8, 64, 32, 2), BLOCKS, 1)


WRITER = """
import sys
from pathlib import Path
from ep2tp.kernels import tuned_configs
tuned_configs.write_json(Path(sys.argv[1]), {"0": 0})
print("ready", flush=True)
while True:
    for size in (1, 20000):
        tuned_configs.write_json(Path(sys.argv[1]), {str(i): i for i in range(size)})
"""


def test_killed_while_writing_a_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for pause in (0.05, 0.11, 0.17):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(pause)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert len(json.loads(path.read_text())) in (1, 20000)


def test_real_vllm_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    from ep2tp.engines.vllm import tuning as vllm

    written = write_engine_file(vllm, tmp_path)
    assert written.name.startswith("E=16,N=256,device_name=")
    assert written.name.endswith(",dtype=fp8_w8a8,block_shape=[128,128].json")
    monkeypatch.setenv(vllm.VARIABLE, str(tmp_path / "vllm"))
    fused_moe.get_moe_configs.cache_clear()
    assert fused_moe.get_moe_configs(16, 256, "fp8_w8a8", 128, 128) == {1: ENGINE_CONFIG, 16: ENGINE_CONFIG}
    assert vllm.default_config(meta_down(), 4, 14) == ENGINE_CONFIG
    assert fused_moe.get_moe_configs(16, 512, "fp8_w8a8", 128, 128) is None
    fused_moe.get_moe_configs.cache_clear()


def write_engine_file(engine: ModuleType, folder: Path) -> Path:
    found = [timed(1, 1.0), timed(16, 1.0), timed(64, 1.0, engine=inf)]
    tuning = Tuning(Slice(16, 1024, 256, 4, BLOCKS), DEVICE, engine.NAME.lower(), found)
    return tuning.write(folder, engine.file_path(meta_down()))[1]


def meta_down() -> ExpertWeights:
    return ExpertWeights(torch.empty(16, 1024, 256, device="meta"), None, BLOCKS)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by make test-kernels")
def test_tuning_keeps_what_is_fastest_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernel in Triton's interpreter; only the clock is not real."""
    from ep2tp.kernels import fused_moe, timing

    real, wrong = fused_moe.fused_moe, set()
    ran: list[Any] = []

    def broken(*args: Any, config: KernelConfig) -> Any:
        ran.append(config)
        right = real(*args, config=config)
        if config.down.warps == 2:
            wrong.add(config)
            return right * 1.1
        return right

    def clock(call: Any, routing: Any) -> float:
        call()
        config = ran.pop()
        return config["num_warps"] if isinstance(config, dict) else config.gate_up.warps + config.down.warps

    engine = SimpleNamespace(
        run=lambda *operands: ran.append(operands[-1]),
        default_config=lambda *_: ENGINE_CONFIG | {"BLOCK_SIZE_K": 32, "num_warps": 8},
    )
    monkeypatch.setattr(fused_moe, "fused_moe", broken)
    monkeypatch.setattr(timing, "milliseconds", clock)
    start = configs.default(1, (8, 9))
    moves = [c for c in kernel_moves(start, True) if c.gate_up.warps == 2 or c.down.warps in (2, 8)]
    monkeypatch.setattr("ep2tp.kernels.tune.kernel_moves", lambda config, can_overlap: moves)
    tuning, told = Tuning(Slice(4, 64, 32, 2, WeightFormat("fp8", (32, 32))), DEVICE, "vllm"), []
    tune(tuning, engine, 600, told.append, (8, 9), tokens=(1, 3))  # type: ignore[arg-type]
    assert tuning.timed == told
    assert [one.tokens for one in told] == [1, 3]
    for one in told:
        assert (one.ours.gate_up.warps, one.ours.down.warps) == (2, 4)
        assert (one.ours_ms, one.engine_ms, one.default_ms) == (6, 4, 8)
        assert not one.wins
    assert wrong
    assert tuning.table() == {(4, 64, 32, 2): []}


def test_without_a_gpu_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("ep2tp.commands.tune._engine", lambda asked: "vllm")
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TinyModel("deepseek_v3").config()))
    result = CliRunner().invoke(main, ["tune", str(model), "--tp", "2", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "PyTorch sees no CUDA GPU here; run it on the machine that serves the model" in result.output
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ep2tp.commands.tune.util.find_spec", lambda name: None)
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TinyModel("deepseek_v3").config()))
    result = CliRunner().invoke(main, ["tune", str(model), "--tp", "2", "--engine", "sglang"])
    assert result.exit_code == 1
    assert "sglang is not installed here" in result.output
