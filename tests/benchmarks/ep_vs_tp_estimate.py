"""What DEP's decode steps would have taken with experts of its own: ``ep_vs_tp_estimate.py RESULTS.jsonl...``.

For launches whose data-parallel ranks all drew the same experts (``shares_experts``): measured, plus what the planner
computes for reading the experts that the whole batch hits instead of one rank's part of it, the wait for the busiest
rank included. An estimate. Two where the link was measured, too: with the card's bandwidth and with the measured one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ep_vs_tp_planner import figures, stored_profile
from ep_vs_tp_table import shares_experts

from ep2tp.planner.profile import Profile


def estimates(path: Path, batches: tuple[str, ...] = ("16", "64")) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """(link, milliseconds by batch: with the card's bandwidth, then with the measured one) of each such launch."""
    machine: dict[str, Any] = {}
    profiles: dict[str, Profile] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["kind"] == "machine":
            machine, profiles = line, {}
        elif "profile" in line:
            profiles[line["link"]] = stored_profile(line["profile"])
        elif "decode" in line and shares_experts(line):
            parts = {str(-(-int(batch) // line["ranks"])): line["decode"][batch] for batch in batches}
            card = machine["gpus"].splitlines()[1].split(",")[0]
            whole, part = (
                figures(machine, {**line, "decode": decode}, profiles.get(line["link"]), card)
                for decode in ({batch: line["decode"][batch] for batch in batches}, parts)
            )
            yield (
                line["link"],
                [
                    {
                        batch: round(line["decode"][batch]["ms"] + _experts(ours) - _experts(theirs), 1)
                        for batch, ours, theirs in zip(
                            batches, whole[way]["decode"].values(), part[way]["decode"].values(), strict=True
                        )
                    }
                    for way in whole
                ],
            )


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
