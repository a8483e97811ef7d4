"""Coordinate descent over kernel configurations, in the spaces of ep2tp's kernel and of the engines' Triton kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import TypeVar

from ep2tp.kernels.configs import KernelConfig, PassConfig

Config = TypeVar("Config")
EngineConfig = Mapping[str, int]

_PASS = {
    "rows": (2, 4, 8, 16, 32, 64, 128),
    "columns": (64, 128, 256, 512, 1024, 2048, 4096),
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 6),
    "registers": (0, 96, 128, 168),
}
_ENGINE = {
    "BLOCK_SIZE_M": (16, 32, 64, 128),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (32, 64, 128, 256),
    "GROUP_SIZE_M": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
_SHARED_MEMORY = 227 * 1024  # bytes that one program can have on SM90, the most of all GPUs; smaller ones say no at run


def descend(
    starts: Sequence[Config],
    moves: Callable[[Config], Iterable[Config]],
    measure: Callable[[Config], float],
    deadline: float,
) -> tuple[Config, float]:
    """The best configuration found before ``deadline``, and its time.

    Args:
        starts: one or more to begin with, best first; the first is measured in any case.
        moves: neighbours of a configuration.
        measure: its time; ``inf`` where it does not run. No configuration is measured twice.
        deadline: by ``time.monotonic()``.
    """
    best, least = starts[0], measure(starts[0])
    seen = [best]
    for start in starts[1:]:
        if start not in seen and time.monotonic() < deadline:
            seen.append(start)
            if (found := measure(start)) < least:
                best, least = start, found
    improved = True
    while improved:
        improved = False
        for candidate in moves(best):
            if time.monotonic() >= deadline:
                return best, least
            if candidate in seen:
                continue
            seen.append(candidate)
            if (found := measure(candidate)) < least:
                best, least, improved = candidate, found, True
    return best, least


def kernel_moves(config: KernelConfig, can_overlap: bool) -> Iterator[KernelConfig]:
    """Configurations of ep2tp's kernel that differ from one in a single choice; those that matter most first.

    Launches overlap only where ``can_overlap`` says that the GPU has the instructions (SM90 on). Into how many slices a
    tile is cut is one choice: its rows and columns follow, and it has as many values as before.
    """
    yield replace(config, by_pair=not config.by_pair)
    yield replace(config, by_token=not config.by_token)
    if can_overlap:
        yield replace(config, overlap=not config.overlap)
    for tiles in _pass_moves(config.gate_up):
        yield replace(config, gate_up=tiles)
    for tiles in _pass_moves(config.down):
        yield replace(config, down=tiles)
    if not config.by_pair:
        for tiles in _slicings(config.gate_up):
            yield replace(config, gate_up=tiles)
    if not config.by_token:
        for tiles in _slicings(config.down):
            yield replace(config, down=tiles)
    for count in _others((1, 2, 4, 8), config.down.tiles):
        yield replace(config, down=replace(config.down, tiles=count))
    for pairs in _others((8, 16, 32, 64), config.pairs):
        yield replace(config, pairs=pairs)


def _pass_moves(tiles: PassConfig) -> Iterator[PassConfig]:
    for field, values in _PASS.items():
        for value in _others(values, getattr(tiles, field)):
            yield replace(tiles, **{field: value})


def _slicings(tiles: PassConfig) -> Iterator[PassConfig]:
    for slices in _others((1, 2, 4, 8), tiles.slices):
        rows, columns = tiles.rows * tiles.slices // slices, tiles.columns * slices // tiles.slices
        if 16 <= rows <= max(_PASS["rows"]) and min(_PASS["columns"]) <= columns <= max(_PASS["columns"]):
            yield replace(tiles, rows=rows, columns=columns, slices=slices)


def engine_moves(
    tokens: int, weight_bytes: int, block: tuple[int, int]
) -> Callable[[EngineConfig], Iterator[EngineConfig]]:
    """Moves in the space of vLLM's and SGLang's Triton kernel, without what cannot run or cannot win.

    Args:
        tokens: of a call; tiles of more rows than twice the tokens only multiply padding.
        weight_bytes: bytes of a weight.
        block: rows and columns that share a scale; (0, 0) without blocks. A tile's K must divide a block's columns.
    """

    def fits(config: EngineConfig) -> bool:
        m, n, k = (config[f"BLOCK_SIZE_{axis}"] for axis in "MNK")
        if m > max(16, 2 * tokens) or (config["GROUP_SIZE_M"] > 1 and tokens < 16):
            return False
        if block[1] and (k > block[1] or block[1] % k):
            return False
        return config["num_stages"] * k * (m + n) * weight_bytes <= _SHARED_MEMORY

    def moves(config: EngineConfig) -> Iterator[EngineConfig]:
        for field, values in _ENGINE.items():
            for value in _others(values, config.get(field, 0)):
                if fits(candidate := {"num_warps": 4, "num_stages": 3, **config, field: value}):
                    yield candidate

    return moves


def _others(values: tuple[int, ...], current: int) -> list[int]:
    """The other values, the nearest ones first."""
    return sorted((v for v in values if v != current), key=lambda v: abs(v.bit_length() - current.bit_length()))


def runs_or_inf(measure: Callable[[Config], float], errors: tuple[type[Exception], ...]) -> Callable[[Config], float]:
    """``measure``, with ``inf`` for a configuration that does not compile or needs more than the GPU has."""

    def guarded(config: Config) -> float:
        try:
            return measure(config)
        except errors:
            return inf
        except RuntimeError as error:  # Triton's own; after some of CUDA's nothing runs any more
            if "illegal" in str(error) or "CUDA error" in str(error):
                raise
            return inf

    return guarded
