"""The results of ep_vs_tp.py as Markdown rows: ``ep_vs_tp_table.py RESULTS.jsonl...``.

A cell is measured / the planner's figure (error), in ms; where the link was measured, too, the planner's second figure
and error are with that. A cell with † is too short, and has no planner's figure: see :func:`shares_experts`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def launches(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The lines of launches, in the order of the files; a later one of the same launch and link stands for both."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line["kind"] == "launch":
                place = (line["link"], line["launch"])
                if place not in found or "error" in found[place]:
                    found[place] = line
    yield from found.values()


def shares_experts(line: dict[str, Any]) -> bool:
    """Whether a launch's data-parallel ranks all drew the same experts, so that its decode steps hit too few.

    So vLLM 0.25.1 does by itself; ep_vs_tp.py did not see to it before it wrote ``own_experts``.
    """
    return line.get("data_parallel_size", 1) > 1 and "own_experts" not in line


def row(line: dict[str, Any]) -> list[str]:
    """The cells of one launch."""
    place = [line["link"], line["launch"] + ("" if line.get("cuda_graphs", True) else " (eager)")]
    if "error" in line:
        return [*place, line["error"]]
    planner = line["planner"]
    ways = [planner["built_in"], *([planner["calibrated"]] if "calibrated" in planner else [])]
    if shares_experts(line):
        decode = [_cell(found, []) + " †" for found in line["decode"].values()]
    else:
        decode = [_cell(found, [way["decode"][batch] for way in ways]) for batch, found in line["decode"].items()]
    return [*place, *decode, _cell(line["prefill"], [way["prefill"] for way in ways])]


def _cell(found: dict[str, Any], computed: list[dict[str, Any]]) -> str:
    spread = f"{found['ms']:.2f} ({found['least']:.2f} to {found['most']:.2f})"
    return " / ".join([spread, *(f"{figure['ms']:.2f} ({figure['error']:+.0%})" for figure in computed)])


def main() -> None:
    """Print the table of the files."""
    rows = [row(line) for line in launches(map(Path, sys.argv[1:]))]
    [batches] = {tuple(line["decode"]) for line in launches(map(Path, sys.argv[1:])) if "decode" in line}
    print("| link | launch | " + " | ".join(f"decode, batch {batch}" for batch in batches) + " | prefill |")
    print("|---" * (len(batches) + 3) + "|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
