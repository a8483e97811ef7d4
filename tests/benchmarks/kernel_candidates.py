"""Tiles that are worth trying, by what fits: bytes in flight, values a thread holds, shared memory."""

from __future__ import annotations

from itertools import product

from ep2tp.kernels.configs import KernelConfig, PassConfig
from ep2tp.kernels.launch import unit_of
from tests.benchmarks.kernel_timing import Shape

BY_PAIR_UP_TO = 32
BY_TOKEN_UP_TO = 64
BY_EXPERT_FROM = 4
QUANTISED_FROM = 16
SEARCHED_WIDELY = 8  # tokens; above, only tiles of the kinds that won there


def _bytes(shape: Shape, rows: int, columns: int) -> float:
    return rows * columns * {"bf16": 2.0, "fp8": 1.0}.get(shape.format.kind, 0.5)


def gate_up_by_pair(shape: Shape) -> list[PassConfig]:
    """A stage has gate and up rows. One stage goes straight to registers, more go by way of shared memory.

    There a thread has one unit of each: where it has several, Triton's layout of shared memory, which follows the order
    of a thread's registers, gives bank conflicts. And it has two inputs at least, or they are not loaded ahead.
    """
    unit = unit_of(shape.format, shape.hidden)
    found = []
    for rows, columns, warps, stages in product((2, 4, 8, 16), (512, 1024, 2048), (2, 4, 8, 16), (1, 3, 4, 6, 8)):
        stage = _bytes(shape, 2 * rows, columns)
        if columns > shape.hidden or not 8_000 <= stage * max(1, stages - 1) <= 64_000:
            continue
        one_unit = rows * columns == 32 * warps * unit and columns >= 64 * warps
        if one_unit if stages > 1 else 32 <= stage / (32 * warps) <= 128:
            found.append(PassConfig(rows, columns, warps, stages))
    return found


def down_by_token(shape: Shape) -> list[PassConfig]:
    """All of a tile is in registers."""
    found = []
    for rows, columns, warps in product((4, 8, 16, 32, 64), (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
        a_thread = _bytes(shape, rows, columns) / (32 * warps)
        if 64 <= a_thread <= 256 and columns < 2 * shape.top_k * shape.inner:
            found.append(PassConfig(rows, columns, warps, 1))
    return found


def by_expert(shape: Shape, matrices: int, depth: int, tiles: int = 1) -> list[PassConfig]:
    """A warp for 16 rows or 32, or for one of several slices; ``depth`` columns in all, ``tiles`` in turn."""
    whole = product(((32, 2, 1), (64, 4, 1), (128, 4, 1), (128, 8, 1)), (128, 256))
    sliced = (
        []
        if shape.format.values_per_byte > 1
        else product(((16, 2, 2), (32, 2, 2), (16, 4, 4), (32, 4, 4), (16, 8, 8), (32, 8, 8)), (_slice(shape),))
    )
    found = []
    for ((rows, warps, slices), size), stages, registers in product((*whole, *sliced), (1, 2, 3, 4), (0, 128)):
        columns = size * slices
        stage = _bytes(shape, matrices * rows, columns)
        trips = -(-depth // columns) * tiles
        single = stages == 1
        if stage / (32 * warps) > 256 or stage < 2_000 or (single != (trips == 1)) or stages > trips + 1:
            continue
        if columns < 2 * depth and (single or 8_000 <= stage * (stages - 1) <= 110_000):
            found.append(PassConfig(rows, columns, warps, stages, tiles, slices, registers))
    return found


def by_expert_quantised(shape: Shape, matrices: int, depth: int, tiles: int = 1) -> list[PassConfig]:
    """Weights go from shared memory to tensor cores as they are, so that a thread holds sums alone."""
    columns = min(128, shape.format.block[1] or 128)
    if shape.format.kind != "fp8" or columns < 32:
        return []
    found = []
    for (rows, warps), stages in product(((32, 2), (64, 4), (128, 4), (128, 8)), (2, 3, 4, 5, 6, 8)):
        in_flight = matrices * rows * columns * (stages - 1)
        if 8_000 <= in_flight <= 100_000 and stages <= -(-depth // columns) * tiles + 1:
            found.append(PassConfig(rows, columns, warps, stages, tiles, input_bits=8))
    return found


def _slice(shape: Shape) -> int:
    """Columns of a slice that has one scale a row; 128 bytes at most."""
    return 64 if shape.format.kind == "bf16" else min(128, shape.format.block[1] or 128)


def first_passes(shape: Shape, tokens: int) -> list[KernelConfig]:
    """Candidates of the first pass, beside a sound second one."""
    few = PassConfig(16, 1024, 4, 1)
    found = []
    if tokens <= BY_PAIR_UP_TO:
        tiles = [p for p in gate_up_by_pair(shape) if tokens <= SEARCHED_WIDELY or p.stages == 1]
        found = [KernelConfig(p, few, True, True, overlap=True) for p in tiles]
    if tokens >= BY_EXPERT_FROM:
        tiles = by_expert(shape, 2, shape.hidden)
        found += [KernelConfig(tile, few, False, True, pairs=8, overlap=True) for tile in tiles]
    if tokens >= QUANTISED_FROM:
        tiles = by_expert_quantised(shape, 2, shape.hidden)
        found += [KernelConfig(tile, few, False, True, pairs=n, overlap=True) for tile, n in product(tiles, (8, 16))]
    return found


def second_passes(shape: Shape, tokens: int) -> list[KernelConfig]:
    """Candidates of the second pass, beside a sound first one."""
    few = PassConfig(16, 512, 8, 3)
    found = []
    if tokens <= BY_TOKEN_UP_TO:
        tiles = [p for p in down_by_token(shape) if tokens <= SEARCHED_WIDELY or (p.columns > 1024 and p.rows < 32)]
        found = [KernelConfig(few, p, True, True, overlap=True) for p in tiles]
    if tokens >= BY_EXPERT_FROM:
        tiles = [p for count in (1, 4) for p in by_expert(shape, 1, shape.inner, count)]
        found += [KernelConfig(few, tile, True, False, pairs=8, overlap=True) for tile in tiles]
    if tokens >= QUANTISED_FROM:
        tiles = [p for count in (1, 4) for p in by_expert_quantised(shape, 1, shape.inner, count)]
        found += [KernelConfig(few, tile, True, False, pairs=n, overlap=True) for tile, n in product(tiles, (8, 16))]
    return found
