"""Configs: what is read is what was written, and the shipped tables are in order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ep2tp.kernels.configs import FOLDER, KernelConfig, PassConfig, default, file_name, from_json, read_table, to_json
from tests.kernels.layers import FP8

FEW = KernelConfig(PassConfig(8, 512, 8, 6), PassConfig(16, 2048, 4, 1), by_pair=True, by_token=True, overlap=True)
MANY = KernelConfig(PassConfig(32, 128, 2, 4), PassConfig(64, 256, 4, 1), by_pair=False, by_token=False, pairs=8)
DEVICE = "NVIDIA H100 80GB HBM3"


def test_json_keeps_everything() -> None:
    sliced = replace(MANY, gate_up=PassConfig(16, 512, 4, 3, slices=4, registers=128))
    for config in (FEW, MANY, sliced):
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_are_in_order(path: Path) -> None:
    table = read_table(path)
    assert table
    for lines in table.values():
        tokens = [most for most, _ in lines]
        assert tokens == sorted(set(tokens))


def test_file_names_have_no_spaces() -> None:
    assert file_name(DEVICE, str(FP8)) == "NVIDIA_H100_80GB_HBM3-fp8-128x128.json"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_defaults_use_only_what_a_gpu_has(capability: tuple[int, int]) -> None:
    for tokens in (1, 64):
        config = default(tokens, capability)
        assert config.overlap == (capability >= (9, 0)) and config.fp8_bits == (capability < (8, 9))
