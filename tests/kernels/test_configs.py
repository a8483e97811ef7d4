"""Tables of measured configs: what is read is what was written, and a missing entry leaves the engine its kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ep2tp.kernels import configs
from ep2tp.kernels.configs import KernelConfig, PassConfig, choose, default, file_name, from_json, to_json
from tests.benchmarks.kernel_sweep import write_tables
from tests.kernels.layers import FP8

FEW = KernelConfig(PassConfig(8, 512, 8, 6), PassConfig(16, 2048, 4, 1), by_pair=True, by_token=True, overlap=True)
MANY = KernelConfig(PassConfig(32, 128, 2, 4), PassConfig(64, 256, 4, 1), by_pair=False, by_token=False, pairs=8)
DEVICE = "NVIDIA H100 80GB HBM3"
DSV3_TP8 = (256, 7168, 256, 8)


def test_json_keeps_everything() -> None:
    sliced = replace(MANY, gate_up=PassConfig(16, 512, 4, 3, slices=4, registers=128))
    for config in (FEW, MANY, sliced):
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_a_sweep_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest right result of each number of tokens; a wrong or a slower one is left out."""

    def line(tokens: int, config: KernelConfig, seconds: float, error: float = 2e-3) -> dict[str, object]:
        figures = {"seconds": seconds, "floor_seconds": 15e-6, "error": error}
        return {"shape": "dsv3-tp8", "tokens": tokens, "pass": "both", "config": to_json(config), **figures}

    results = [line(1, MANY, 30e-6), line(1, FEW, 20e-6), line(8, MANY, 120e-6), line(8, FEW, 1e-6, error=0.5)]
    sweep = tmp_path / "sweep.json"
    header = {"device": DEVICE, "torch": "2", "triton": "3", "copy_bytes_per_s": 3e12}
    sweep.write_text(json.dumps({**header, "results": results}))
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "configs")
    configs._cached_table.cache_clear()
    write_tables([sweep])
    assert [choose(DEVICE, DSV3_TP8, FP8, tokens) for tokens in (1, 2, 8, 9)] == [FEW, MANY, MANY, None]
    assert choose(DEVICE, (128, 7168, 256, 8), FP8, 1) is None
    assert choose("another", DSV3_TP8, FP8, 1) is None
    configs._cached_table.cache_clear()
    table = tmp_path / "table.json"
    for lines, few in (([faster(1, "ep2tp"), faster(8, "vllm")], FEW), ([faster(1, "vllm")], None), ([], None)):
        table.write_text(json.dumps({"lines": lines}))
        for path in configs.FOLDER.iterdir():
            path.unlink()
        write_tables([sweep], table)
        configs._cached_table.cache_clear()
        assert [choose(DEVICE, DSV3_TP8, FP8, tokens) for tokens in (1, 2, 8)] == [few, None, None]
    configs._cached_table.cache_clear()


def faster(tokens: int, name: str) -> dict[str, object]:
    """A line of kernel_table.py."""
    return {"shape": "dsv3-tp8", "tokens": tokens, "vllm": {"seconds": 3e-5 if name == "ep2tp" else 1e-6}}


def test_file_names_have_no_spaces() -> None:
    assert file_name(DEVICE, str(FP8)) == "NVIDIA_H100_80GB_HBM3-fp8-128x128.json"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_defaults_use_only_what_a_gpu_has(capability: tuple[int, int]) -> None:
    for tokens in (1, 64):
        config = default(tokens, capability)
        assert config.overlap == (capability >= (9, 0)) and config.fp8_bits == (capability < (8, 9))
