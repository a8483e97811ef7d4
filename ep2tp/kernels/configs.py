"""Which tiles the kernel runs with, by GPU, format, shape and number of tokens; and where the engine's kernel wins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ep2tp.kernels.operands import WeightFormat

FOLDER = Path(__file__).parent / "configs"
COMPARED_WITH = "vllm"
"""The engine whose kernel the tables that ship with ep2tp were measured against."""
Key = tuple[int, int, int, int]
"""Experts, hidden size K, one rank's intermediate size I, top-k."""


@dataclass(frozen=True)
class PassConfig:
    """Tiles of one pass.

    Attributes:
        rows: of the weight matrix in a tile: intermediate channels (gate and up each) or outputs.
        columns: of the weight matrix in a tile, in values.
        warps: of 32 threads a program.
        stages: of the loads' software pipeline.
        tiles: that a program takes in turn, in the second pass by expert: what finding the expert's pairs costs is then
            shared by as many.
        slices: of a tile's columns that are multiplied side by side and summed at the end, by expert. A program has few
            rows then, and all of them end at about the same time. Where a slice would have several scales a row there
            are more, and in formats of two values a byte one.
        registers: of 32 bits that a thread may have, so that more programs are at work at a time; 0: no limit.
        input_bits: 8: inputs of FP8 weights are quantised to FP8 on the way, by expert, and no weight is converted. A
            group of a pair's inputs that has one scale is a tile's columns, as many as have one weight scale at the
            most; where these are fewer than 32, in other formats and with ``fp8_bits``, inputs stay as they are (16).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    tiles: int = 1
    slices: int = 1
    registers: int = 0
    input_bits: int = 16


@dataclass(frozen=True)
class KernelConfig:
    """Tiles and methods of both passes.

    Attributes:
        gate_up: tiles of the first pass.
        down: tiles of the second.
        by_pair: the first pass has a program a (token, expert) pair and multiplies on CUDA cores; else a program an
            expert, with tensor cores.
        by_token: the second pass has a program a token and sums its experts; else a program an expert, and a third
            launch sums.
        pairs: of one expert multiplied at a time on tensor cores.
        overlap: launch a pass while the one before it still runs (programmatic dependent launch, SM90 on).
        fp8_bits: dequantise FP8 by integer arithmetic, which GPUs before SM89 need.
    """

    gate_up: PassConfig
    down: PassConfig
    by_pair: bool
    by_token: bool
    pairs: int = 16
    overlap: bool = False
    fp8_bits: bool = False


Lines = Sequence[tuple[int, KernelConfig]]
Table = Mapping[Key, Lines]
"""For each shape: (most tokens, config), tokens rising; above the last one the engine's kernel is faster."""


def default(tokens: int, capability: tuple[int, int]) -> KernelConfig:
    """A sound choice for shapes that no table has."""
    few = tokens <= 4
    return KernelConfig(
        gate_up=PassConfig(8, 512, 8, 6) if few else PassConfig(32, 128, 4, 4),
        down=PassConfig(16, 1024, 4, 1) if few else PassConfig(128, 128, 4, 3, tiles=4),
        by_pair=few,
        by_token=few,
        overlap=capability >= (9, 0),
        fp8_bits=capability < (8, 9),
    )


def choose(device_name: str, key: Key, weight_format: WeightFormat, tokens: int) -> KernelConfig | None:
    """The fastest measured config, or None where the engine's own kernel is faster or nothing was measured."""
    lines = shipped(device_name, key, weight_format)
    return next((config for most, config in lines if tokens <= most), None)


def shipped(device_name: str, key: Key, weight_format: WeightFormat) -> Lines:
    """All that ep2tp has of a shape on a device: (most tokens, config), tokens rising."""
    return _cached_table(FOLDER / file_name(device_name, str(weight_format))).get(key, [])


def file_name(device_name: str, weight_format: str) -> str:
    """Name of the table of one GPU and format."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', device_name)}-{weight_format}.json"


def read_table(path: Path) -> Table:
    """A table; empty where there is no such file."""
    if not path.exists():
        return {}
    shapes = json.loads(path.read_text(encoding="utf-8"))["shapes"]
    return {
        (shape["E"], shape["K"], shape["I"], shape["top_k"]): [
            (int(line["max_tokens"]), from_json(line["config"])) for line in shape["configs"]
        ]
        for shape in shapes
    }


_cached_table = lru_cache(read_table)


def from_json(fields: dict[str, Any]) -> KernelConfig:
    """The config that :func:`to_json` wrote."""
    passes = {name: PassConfig(**fields[name]) for name in ("gate_up", "down")}
    return KernelConfig(**{**fields, **passes})


def to_json(config: KernelConfig) -> dict[str, Any]:
    """Plain fields."""
    return asdict(config)
