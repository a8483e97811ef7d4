"""Turns sweeps into the tables that ep2tp ships: ``kernel_choice.py sweep.json... [--against table.json]``.

A shape's candidates are what the tables have now and what the sweeps found. Inputs of 16 bits come first; of 8 bits, to
which vLLM's kernel rounds too, where only they are faster than it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kernel_sweep import fastest, fastest_of_each, input_bits

from ep2tp.kernels import configs
from ep2tp.kernels.configs import KernelConfig, file_name, from_json, to_json
from tests.benchmarks.kernel_timing import SHAPES, Shape


class Candidate(NamedTuple):
    """A config and its time."""

    seconds: float
    config: KernelConfig


Candidates = dict[int, dict[int, Candidate]]
"""The fastest of a shape, by tokens and bits of the inputs."""


def gather(sweeps: list[dict[str, Any]], device: str) -> dict[str, Candidates]:
    """By shape, the fastest of the tables and the sweeps."""
    found: dict[str, Candidates] = {name: defaultdict(dict) for name in SHAPES}

    def add(name: str, tokens: int, candidate: Candidate) -> None:
        place = found[name][tokens]
        bits = input_bits(candidate.config)
        if bits not in place or candidate.seconds < place[bits].seconds:
            place[bits] = candidate

    for shape in SHAPES.values():
        for entry in _entries(device, shape):
            add(shape.name, entry["max_tokens"], Candidate(entry["microseconds"] / 1e6, from_json(entry["config"])))
    for sweep in sweeps:
        for name, tokens in fastest(sweep["results"]):
            for timed in fastest_of_each(sweep["results"], name, tokens):
                add(name, tokens, Candidate(*timed))
    return found


def _entries(device: str, shape: Shape) -> list[dict[str, Any]]:
    path = configs.FOLDER / file_name(device, str(shape.format))
    shapes = json.loads(path.read_text(encoding="utf-8"))["shapes"] if path.exists() else []
    return [entry for one in shapes if one["name"] == shape.name for entry in one["configs"]]


def chosen(shape: Shape, candidates: Candidates, lines: list[dict[str, Any]] | None) -> Iterator[tuple[int, Candidate]]:
    """(tokens, candidate), up to the first number of tokens at which vLLM was faster or was not timed.

    Args:
        shape: whose candidates they are.
        candidates: where a number of tokens has none, those of the next one stand in, with their longer time.
        lines: of kernel_table.py; a candidate that it timed has its time from there. None: nothing is compared.
    """
    if lines is None:
        yield from ((tokens, by_bits[16]) for tokens, by_bits in sorted(candidates.items()) if 16 in by_bits)
        return
    for line in (line for line in lines if line["shape"] == shape.name):
        tokens, theirs = line["tokens"], line.get("vllm", {}).get("seconds", 0.0)
        most = next((most for most in sorted(candidates) if tokens <= most), 0)
        by_bits = candidates.get(most, {})
        timed = [_timed(by_bits[bits], line) for bits in (16, 8) if bits in by_bits]
        # Runs differ by 2%: a time of another run has to be better by as much.
        limits = [theirs if is_same_run else 0.98 * theirs for _, is_same_run in timed]
        winners = [one for (one, _), limit in zip(timed, limits, strict=True) if one.seconds < limit]
        if not winners:
            return
        if most == tokens:
            yield tokens, winners[0]


def _timed(candidate: Candidate, line: dict[str, Any]) -> tuple[Candidate, bool]:
    """With its time of the line's run, and whether it has one."""
    own = line.get("ep2tp", {})
    if own.get("config") != to_json(candidate.config):
        return candidate, False
    return candidate._replace(seconds=own["seconds"]), True


def write_tables(sweeps: list[dict[str, Any]], table: dict[str, Any] | None) -> None:
    """Write the tables of the sweeps' device; ``table`` is what kernel_table.py measured."""
    header = sweeps[-1] if sweeps else table
    assert header is not None, "name a sweep, or a table to compare with"
    found = gather(sweeps, header["device"])
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for shape in SHAPES.values():
        lines = [
            {"max_tokens": tokens, "microseconds": round(seconds * 1e6, 1), "config": to_json(config)}
            for tokens, (seconds, config) in chosen(shape, found[shape.name], table and table["lines"])
        ]
        if lines:
            key = dict(zip(("E", "K", "I", "top_k"), shape.key, strict=True))
            tables[str(shape.format)].append({**key, "name": shape.name, "configs": lines})
    measured = {key: header[key] for key in ("device", "torch", "triton")}
    configs.FOLDER.mkdir(exist_ok=True)
    for stored, shapes in tables.items():
        target = configs.FOLDER / file_name(header["device"], stored)
        target.write_text(json.dumps({"measured": measured, "shapes": shapes}, indent=1) + "\n", encoding="utf-8")
        print(target)


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="*", help="results of one kind of device")
    parser.add_argument("--against", type=Path, help="what kernel_table.py measured")
    options = parser.parse_args()
    sweeps = [json.loads(path.read_text(encoding="utf-8")) for path in options.sweeps]
    write_tables(sweeps, json.loads(options.against.read_text(encoding="utf-8")) if options.against else None)


if __name__ == "__main__":
    main()
