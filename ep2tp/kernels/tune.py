"""Finds the fastest configurations for this GPU and one rank's experts, of ep2tp's kernel and of an engine's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ep2tp.kernels import configs, tuned_configs
from ep2tp.kernels.configs import KernelConfig
from ep2tp.kernels.search import EngineConfig, descend, engine_moves, kernel_moves, runs_or_inf
from ep2tp.kernels.slices import Slice

if TYPE_CHECKING:
    from ep2tp.kernels.operands import ExpertWeights

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
"""Tokens of a call at which kernels are timed: decode steps first."""

_NEAR = 1e-2  # relative error in BF16; a configuration that computes something else never wins


@dataclass(frozen=True)
class Timed:
    """What came of one number of tokens: configurations, and milliseconds (``inf``: none runs)."""

    tokens: int
    ours: KernelConfig
    ours_ms: float
    engine: EngineConfig
    engine_ms: float
    default_ms: float

    @property
    def wins(self) -> bool:
        """Whether ep2tp's kernel is faster than the engine's tuned one; not where the engine's did not run."""
        return isfinite(self.engine_ms) and self.ours_ms < self.engine_ms


@dataclass
class Tuning:
    """One slice's results on one GPU against one engine's kernel (``vllm`` or ``sglang``), by number of tokens."""

    slice: Slice
    device: str
    engine: str
    timed: list[Timed] = field(default_factory=list)

    def table(self) -> configs.Table:
        """ep2tp's own: configurations up to the first number of tokens at which the engine's kernel is faster.

        Where none was timed at which it is, lines that ship with ep2tp follow for more tokens, if they were compared
        with this engine's kernel.
        """
        lines: list[tuple[int, KernelConfig]] = []
        for one in sorted(self.timed, key=lambda t: t.tokens):
            if not one.wins:
                return {self.slice.key: lines}
            lines.append((one.tokens, one.ours))
        most = max(one.tokens for one in self.timed)
        shipped: configs.Lines = ()
        if self.engine == configs.COMPARED_WITH:
            shipped = configs.shipped(self.device, self.slice.key, self.slice.format)
        return {self.slice.key: [*lines, *(line for line in shipped if line[0] > most)]}

    def engine_file(self) -> dict[str, EngineConfig]:
        """The engine's own file: configurations by number of tokens."""
        return {str(one.tokens): one.engine for one in self.timed if isfinite(one.engine_ms)}

    def write(self, folder: Path, engine_file: Path) -> list[Path]:
        """Write both into the engine's part of ``folder``; returns the files. None where nothing was timed."""
        if not self.timed:
            return []
        folder /= self.engine
        own = folder / configs.file_name(self.device, str(self.slice.format))
        tuned_configs.write_table(own, self.table())
        written = [own]
        if found := self.engine_file():
            written.append(folder / engine_file)
            tuned_configs.write_json(written[-1], found)
        return written


def tune(
    tuning: Tuning,
    engine: ModuleType,
    seconds: float,
    tell: Callable[[Timed], None],
    capability: tuple[int, int],
    tokens: Iterable[int] = TOKENS,
) -> None:
    """Fill ``tuning`` with results. What is there when it is interrupted is complete.

    Args:
        tuning: with a slice; its random weights are made here, on PyTorch's default device.
        engine: ``ep2tp.engines.vllm.tuning`` or SGLang's.
        seconds: for everything; each number of tokens gets an equal share of what is left, half for either kernel, and
            at least the time of its first configuration.
        tell: called with each result.
        capability: the GPU's, such as (9, 0).
        tokens: numbers of tokens.
    """
    gate_up, down = _random_experts(tuning.slice)
    deadline, left = time.monotonic() + seconds, list(tokens)
    while left:
        count = left.pop(0)
        share = (deadline - time.monotonic()) / (len(left) + 1)
        tell(_one(tuning, engine, gate_up, down, count, capability, max(share, 0)))


def _one(
    tuning: Tuning,
    engine: ModuleType,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    tokens: int,
    capability: tuple[int, int],
    share: float,
) -> Timed:
    import torch

    from ep2tp.kernels.fused_moe import fused_moe
    from ep2tp.kernels.reference import fused_moe_reference
    from ep2tp.kernels.timing import Routing, launch_errors, milliseconds

    s = tuning.slice
    x = torch.randn((tokens, s.hidden), dtype=torch.bfloat16)
    routing = Routing(tokens, s.experts, s.top_k)
    weights, ids = routing.weights.clone(), routing.ids.clone()
    right = fused_moe_reference(x, gate_up, down, weights, ids, dtype=torch.float32)
    errors = launch_errors()

    def ours(config: KernelConfig) -> float:
        found = fused_moe(x, gate_up, down, weights, ids, config=config).float()
        if not (found - right).norm() <= _NEAR * right.norm():  # a NaN is not near either
            return inf
        return milliseconds(lambda: fused_moe(x, gate_up, down, routing.weights, routing.ids, config=config), routing)

    def theirs(config: EngineConfig) -> float:
        return milliseconds(lambda: engine.run(x, gate_up, down, routing.weights, routing.ids, config), routing)

    now = time.monotonic()
    shipped = configs.choose(tuning.device, s.key, s.format, tokens)
    starts = [*([shipped] if shipped else []), configs.default(tokens, capability)]
    starts += [one.ours for one in tuning.timed[-1:]]
    own_moves = partial(kernel_moves, can_overlap=capability >= (9, 0))
    best, best_ms = descend(starts, own_moves, runs_or_inf(ours, errors), now + share / 2)
    default: Mapping[str, int] = engine.default_config(down, s.top_k, tokens)
    guarded = runs_or_inf(theirs, errors)
    moves = engine_moves(tokens, down.values.element_size(), s.format.block)
    engine_best, engine_ms = descend([default, *(t.engine for t in tuning.timed[-1:])], moves, guarded, now + share)
    found = Timed(tokens, best, best_ms, engine_best, engine_ms, guarded(default))
    tuning.timed.append(found)
    return found


def _random_experts(s: Slice) -> tuple[ExpertWeights, ExpertWeights]:
    import torch

    from ep2tp.kernels.operands import ExpertWeights
    from ep2tp.kernels.timing import random_weights

    def one(rows: int, columns: int) -> ExpertWeights:
        is_fp8 = s.format.kind == "fp8"
        values = random_weights((s.experts, rows, columns), is_fp8)
        scales = torch.full((s.experts, *s.format.scale_shape(rows, columns)), 1e-3) if is_fp8 else None
        return ExpertWeights(values, scales, s.format)

    return one(2 * s.size, s.hidden), one(s.hidden, s.size)
