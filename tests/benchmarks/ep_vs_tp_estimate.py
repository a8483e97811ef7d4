"""What DEP's decode steps would have taken with experts of its own: ``ep_vs_tp_estimate.py RESULTS.jsonl...``.

For launches whose data-parallel ranks all drew the same experts (``shares_experts``): measured, plus what the planner
computes for reading the experts that the whole batch hits instead of one rank's part of it, the wait for the busiest
rank included. An estimate. Two where the link was measured, too: with the card's bandwidth and with the measured one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

from ep_vs_tp_planner import with_planner
from ep_vs_tp_table import shares_experts

BATCHES = ("16", "64")


def estimates(path: Path) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """(link, milliseconds by batch: with the card's bandwidth, then with the measured one) of each such launch."""
    for line, planner in with_planner(path):
        if "decode" in line and shares_experts(line):
            found = {batch: line["decode"][batch] for batch in BATCHES}
            drawn = {batch: str(ceil(int(batch) / line["ranks"])) for batch in BATCHES}
            whole = planner({**line, "decode": found})
            part = planner({**line, "decode": {drawn[batch]: found[batch] for batch in BATCHES}})
            yield line["link"], [_estimate(found, drawn, whole[way]["decode"], part[way]["decode"]) for way in whole]


def _estimate(
    found: dict[str, Any], drawn: dict[str, str], whole: dict[str, Any], part: dict[str, Any]
) -> dict[str, float]:
    """By batch: measured, plus what its experts take, less what those take that were drawn."""
    return {b: round(found[b]["ms"] + _experts(whole[b]) - _experts(part[drawn[b]]), 1) for b in found}


def _experts(step: dict[str, float]) -> float:
    """Dense weights are the same in both and cancel."""
    return step["weights"] + step["straggler"]


def main() -> None:
    """Print the files' estimates."""
    for path in map(Path, sys.argv[1:]):
        for link, found in estimates(path):
            print(path.stem, link, *found)


if __name__ == "__main__":
    main()
