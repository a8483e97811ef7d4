"""Finds the kernel's fastest tiles on this GPU: ``kernel_sweep.py --out FOLDER --seconds 200 [--shapes A,B]``.

For each shape and number of tokens, in order of importance, until the time is up: each pass's candidates are compiled
by as many processes as it may use cores, checked against float64 (fresh inputs, poisoned output) and timed alone, then
the best of both passes together (for one token also without overlap). Writes sweep.json and ends with a table.
kernel_choice.py turns results into ep2tp/kernels/configs/*.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

ORDER = (
    ("dsv3-tp8", (1, 4, 16, 64)), ("qwen3-235b-tp8-padded", (1, 4, 16, 64)), ("kimi-k2-tp8", (1, 4, 16, 64)),
    ("dsv3-tp8", (2, 8, 32)), ("qwen3-235b-tp8-padded", (2, 8, 32)), ("glm-4.5-air-tp4-padded", (1, 4, 16, 64)),
    ("dsv3-tp4", (1, 4, 16, 64)), ("kimi-k2-tp8", (2, 8, 32)), ("glm-4.5-air-tp4-padded", (2, 8, 32)),
    ("qwen3-235b-tp8", (1, 4, 16, 64)), ("glm-4.5-air-tp4", (1, 4, 16, 64)), ("minimax-320", (1, 4, 16, 64)),
    ("glm-4.5-tp8-bf16", (1, 2, 4, 8, 16, 32, 64)), ("glm-4.5-air-tp8-bf16", (1, 2, 4, 8, 16, 32, 64)),
    ("dsv3-tp4", (2, 8, 32)), ("dsv3-tp8-int4", (1, 8)), ("dsv3-tp8-nvfp4", (1, 8)), ("gpt-oss-120b-tp4", (1, 8)),
    ("glm-4.5-air-tp8", (1, 8)), ("dsv3-tp2", (1, 2, 4, 8, 16, 32, 64)),
)  # fmt: skip
ERROR_LIMITS = {16: 6e-3, 8: 6e-2}  # by bits of the inputs; a wrong tile is off by far more


def compile_candidate(shape_name: str, tokens: int, config: Any, which: str, capability: int) -> str | None:
    """In a process of its own: fill Triton's cache with one pass's kernels; the error if it cannot be compiled."""
    from tests.benchmarks.kernel_timing import SHAPES
    from tests.kernels.offline import launches, pretend

    shape = SHAPES[shape_name]
    pretend(capability)  # the same cache entries as on the GPU, without a context on it
    try:
        for launch in launches(config, shape.format, shape.key, tokens):
            if launch.name.startswith(which) or (which == "down" and launch.name == "combine"):
                launch.compile()
    except Exception as error:  # a candidate too large for the GPU is not an error of the sweep
        return f"{type(error).__name__}: {error}"[:300]
    return None


class Sweep:
    """Times candidates until a deadline, and keeps every result."""

    def __init__(self, out: Path, seconds: float, capability: int) -> None:
        self.out, self.deadline = out, time.monotonic() + seconds
        self.capability = capability
        self.results: list[dict[str, Any]] = []
        self.header: dict[str, Any] = {}
        self.pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("spawn"))
        self.jobs: dict[tuple[Any, ...], Future[str | None]] = {}

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def compile(self, shape: Any, tokens: int, config: Any, which: str) -> Future[str | None]:
        """Start to compile, once."""
        key = (shape.name, tokens, config, which)
        if key not in self.jobs:
            self.jobs[key] = self.pool.submit(compile_candidate, *(shape.name, tokens, config, which), self.capability)
        return self.jobs[key]

    def keep(self, shape: Any, tokens: int, which: str, config: Any, **figures: Any) -> None:
        """Add a line to the results."""
        from ep2tp.kernels.configs import to_json

        line = {"shape": shape.name, "tokens": tokens, "pass": which, "config": to_json(config), **figures}
        self.results.append(line)

    def save(self) -> None:
        """Write everything so far."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "sweep.json").write_text(json.dumps({**self.header, "results": self.results}, indent=1))


def sweep_point(sweep: Sweep, shape: Any, tokens: int, layer: Any) -> None:
    """All candidates of one shape and number of tokens."""
    import torch

    from ep2tp.kernels.fused_moe import fused_moe
    from ep2tp.kernels.launch import Layer, run_down, run_gate_up
    from ep2tp.kernels.operands import Activation
    from ep2tp.kernels.reference import fused_moe_reference
    from tests.benchmarks.kernel_candidates import first_passes, second_passes
    from tests.benchmarks.kernel_timing import bytes_read, make_batches, seconds_a_call
    from tests.kernels.layers import relative_error

    gate_up, down = layer
    batches = make_batches(shape, tokens)
    moe = Layer(gate_up, down, Activation.SILU, False)
    checked = make_batches(shape, tokens, seed=time.monotonic_ns() % 2**31)[0]
    reference = fused_moe_reference(checked.x, gate_up, down, checked.topk_weights, checked.topk_ids)

    def error_of(config: Any) -> float:
        out = torch.full_like(checked.x, float("nan"))
        fused_moe(checked.x, gate_up, down, checked.topk_weights, checked.topk_ids, out=out, config=config)
        return relative_error(out, reference)

    def first(config: Any) -> list[Any]:
        return [lambda b=b: run_gate_up(moe, config, b.x, b.topk_weights, b.topk_ids) for b in batches]

    outs = [torch.empty_like(batch.x) for batch in batches]
    inners = [run_gate_up(moe, first_passes(shape, tokens)[0], b.x, b.topk_weights, b.topk_ids) for b in batches]

    def second(config: Any) -> list[Any]:
        return [
            lambda b=b, i=i, o=o: run_down(moe, config, i, b.topk_weights, b.topk_ids, o)
            for b, i, o in zip(batches, inners, outs, strict=True)
        ]

    def both(config: Any) -> list[Any]:
        return [
            lambda b=b, o=o: fused_moe(b.x, gate_up, down, b.topk_weights, b.topk_ids, out=o, config=config)
            for b, o in zip(batches, outs, strict=True)
        ]

    def limit_of(config: Any) -> float:
        return ERROR_LIMITS[input_bits(config)]

    best: dict[str, list[tuple[float, Any]]] = {"gate_up": [], "down": []}
    for which, configs, calls in (
        ("gate_up", first_passes(shape, tokens), first),
        ("down", second_passes(shape, tokens), second),
    ):
        waiting = {config: sweep.compile(shape, tokens, config, which) for config in configs}
        for config, job in waiting.items():
            if sweep.is_late:
                return
            failure = job.result()
            if failure is None:
                try:
                    error = error_of(config)
                    times = seconds_a_call(calls(config), least_seconds=0.01) if error < limit_of(config) else []
                except Exception as problem:  # too much shared memory or too many registers for this GPU
                    failure, error, times = f"{type(problem).__name__}: {problem}"[:300], None, []
            if failure is not None:
                sweep.keep(shape, tokens, which, config, failure=failure)
                continue
            median = statistics.median(times) if times else None
            sweep.keep(shape, tokens, which, config, error=error, seconds=median)
            if median is not None:
                best[which].append((median, config))
        best[which] = shortlist(best[which])

    floor = bytes_read(gate_up, down, batches) / sweep.header["copy_bytes_per_s"]
    for config in together(best["gate_up"], best["down"], with_plain=tokens == 1):
        if sweep.is_late:
            return
        try:
            error = error_of(config)
            times = seconds_a_call(both(config))
        except Exception as problem:
            sweep.keep(shape, tokens, "both", config, failure=f"{type(problem).__name__}: {problem}"[:300])
            continue
        figures = {"seconds": statistics.median(times), "least": times[0], "floor_seconds": floor}
        sweep.keep(shape, tokens, "both", config, error=error, **figures)
    sweep.save()


def together(firsts: list[Any], seconds: list[Any], with_plain: bool) -> Iterator[Any]:
    """Each first pass with each second one, with the pairs a product of either of them that is by expert.

    Args:
        firsts: configs whose first pass counts.
        seconds: configs whose second pass counts.
        with_plain: also the fastest of both without overlap.
    """
    for one, two in product(firsts, seconds):
        pairs = {config.pairs for config, alone in ((one, one.by_pair), (two, two.by_token)) if not alone}
        for count in sorted(pairs or {two.pairs}):
            yield replace(two, gate_up=one.gate_up, by_pair=one.by_pair, pairs=count, overlap=True)
    if with_plain and firsts and seconds:
        yield replace(seconds[0], gate_up=firsts[0].gate_up, by_pair=firsts[0].by_pair, overlap=False)


def input_bits(config: Any) -> int:
    """The fewest bits of an input in either pass."""
    return min(config.gate_up.input_bits, config.down.input_bits)


def shortlist(timed: list[tuple[float, Any]]) -> list[Any]:
    """The fastest with inputs of 16 bits, and of 8."""
    ranked = [config for _, config in sorted(timed, key=lambda pair: pair[0])]
    return [config for bits in (16, 8) for config in [c for c in ranked if input_bits(c) == bits][:4]]


def fastest(results: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """The best right result of both passes, by shape and tokens."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for line in results:
        if line["pass"] != "both" or line.get("seconds") is None or not is_right(line):
            continue
        key = (line["shape"], line["tokens"])
        if key not in best or line["seconds"] < best[key]["seconds"]:
            best[key] = line
    return best


def fastest_of_each(results: list[dict[str, Any]], name: str, tokens: int) -> Iterator[tuple[float, Any]]:
    """(seconds, config) of a point's :func:`fastest` with inputs of 16 bits, and with inputs of 8."""
    from ep2tp.kernels.configs import from_json

    here = [line for line in results if (line["shape"], line["tokens"]) == (name, tokens)]
    for bits in (16, 8):
        for line in fastest([line for line in here if input_bits(from_json(line["config"])) == bits]).values():
            yield line["seconds"], from_json(line["config"])


def is_right(line: dict[str, Any]) -> bool:
    """Whether a result is near the reference."""
    from ep2tp.kernels.configs import from_json

    return bool(line["error"] < ERROR_LIMITS[input_bits(from_json(line["config"]))])


def print_table(header: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """One line a point, with the best times of the passes alone."""
    alone: dict[tuple[str, int, str], float] = defaultdict(lambda: float("inf"))
    for line in results:
        if line["pass"] != "both" and line.get("seconds"):
            key = (line["shape"], line["tokens"], line["pass"])
            alone[key] = min(alone[key], line["seconds"])
    failures = sum("failure" in line for line in results)
    wrong = sum(line.get("error") is not None and not is_right(line) for line in results)
    copy, dense = header["copy_bytes_per_s"] / 1e12, header["dense_flops"] / 1e12
    print(f"{header['device']}, copy {copy:.2f} TB/s, dense {dense:.0f} TFLOP/s, torch {header['torch']},")
    print(f"triton {header['triton']}: {len(results)} candidates, {failures} not run, {wrong} wrong")
    print("shape | M | µs | share | gate_up + down alone, µs | no overlap, µs | error | config")
    plain = {
        (line["shape"], line["tokens"]): line["seconds"]
        for line in results
        if line["pass"] == "both" and line.get("seconds") and not line["config"]["overlap"]
    }
    for (shape, tokens), line in fastest(results).items():
        passes = " + ".join(f"{alone[shape, tokens, which] * 1e6:.1f}" for which in ("gate_up", "down"))
        share = line["floor_seconds"] / line["seconds"]
        no_overlap = plain.get((shape, tokens), float("nan")) * 1e6
        print(
            f"{shape} | {tokens} | {line['seconds'] * 1e6:.1f} | {share:.0%} | {passes} | {no_overlap:.1f}"
            f" | {line['error']:.1e} | {_short(line['config'])}"
        )


def _short(config: dict[str, Any]) -> str:
    def tile(one: dict[str, int]) -> str:
        return f"{one['rows']}x{one['columns']}w{one['warps']}s{one['stages']}"

    first = f"{'pair' if config['by_pair'] else 'expert'} {tile(config['gate_up'])}"
    second = f"{'token' if config['by_token'] else 'expert'} {tile(config['down'])}"
    return f"{first}, {second}{', overlap' if config['overlap'] else ''}"


def main() -> None:
    """Sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sweep"))
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--shapes", help="only these, comma-separated")
    parser.add_argument("--tokens", help="only these numbers of tokens, comma-separated")
    parser.add_argument("--known", type=Path, help="an earlier sweep.json: its points are not timed again")
    chosen = parser.parse_args()
    import torch
    import triton

    from tests.benchmarks.kernel_candidates import first_passes, second_passes
    from tests.benchmarks.kernel_timing import SHAPES, copy_bandwidth, dense_flops, make_layer

    major, minor = torch.cuda.get_device_capability()
    sweep = Sweep(chosen.out, chosen.seconds, 10 * major + minor)
    known = fastest(json.loads(chosen.known.read_text())["results"]) if chosen.known else {}
    points = [
        (SHAPES[name], tokens)
        for name, counts in ORDER
        for tokens in counts
        if (not chosen.shapes or name in chosen.shapes.split(","))
        and (not chosen.tokens or str(tokens) in chosen.tokens.split(","))
        and (name, tokens) not in known
    ]
    for shape, tokens in points[:4]:  # the processes compile while ceilings are measured and layers are made
        for which, configs in (("gate_up", first_passes(shape, tokens)), ("down", second_passes(shape, tokens))):
            for config in configs:
                sweep.compile(shape, tokens, config, which)
    sweep.header = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_bytes_per_s": copy_bandwidth(), "dense_flops": dense_flops(),
    }  # fmt: skip
    layers: dict[str, Any] = {}
    try:
        for index, (shape, tokens) in enumerate(points):
            if sweep.is_late:
                break
            if shape.name not in layers:
                layers[shape.name] = make_layer(shape)
            for ahead, count in points[index + 1 : index + 3]:
                for which, configs in (("gate_up", first_passes(ahead, count)), ("down", second_passes(ahead, count))):
                    for config in configs:
                        sweep.compile(ahead, count, config, which)
            sweep_point(sweep, shape, tokens, layers[shape.name])
    finally:
        sweep.pool.shutdown(wait=False, cancel_futures=True)
        sweep.save()
        print_table(sweep.header, sweep.results)


if __name__ == "__main__":
    main()
