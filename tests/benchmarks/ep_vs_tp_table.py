"""The results of ep_vs_tp.py as Markdown rows for docs/planning.md: ``ep_vs_tp_table.py RESULTS.jsonl``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(line: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """(link, launch, what, measured, planner with built-in links, error, planner calibrated, error) of one launch."""
    place = (line["link"], line["launch"] + ("" if line["cuda_graphs"] else " (eager)"))
    if "error" in line:
        yield (*place, "", line["error"], "", "", "", "")
        return
    figures = line["planner"]
    built_in, calibrated = figures["built_in"], figures.get("calibrated", {})
    weights = (f"{line['weights_gb']:.2f} GB", f"{built_in['weights_gb']:.2f} GB", f"{built_in['weights_error']:+.1%}")
    yield (*place, "weights a GPU", *weights, "", "")
    for batch, found in line["decode"].items():
        yield (*place, f"decode, batch {batch}", *_times(found, built_in["decode"][batch], calibrated, "decode", batch))
    yield (*place, "prefill", *_times(line["prefill"], built_in["prefill"], calibrated, "prefill", None))


def _times(
    found: dict[str, Any], built_in: dict[str, Any], calibrated: dict[str, Any], part: str, batch: str | None
) -> tuple[str, ...]:
    measured = f"{found['ms']:.2f} ({found['least']:.2f} to {found['most']:.2f}) ms"
    other = calibrated.get(part) or {}
    other = other.get(batch, {}) if batch else other
    return (measured, *_computed(built_in), *(_computed(other) if other else ("", "")))


def _computed(figure: dict[str, Any]) -> tuple[str, str]:
    return f"{figure['ms']:.2f} ms", "" if figure["error"] is None else f"{figure['error']:+.0%}"


def main() -> None:
    """Print the table of a file."""
    print("| link | launch | what | measured | planner | error | planner, calibrated | error |")
    print("|---|---|---|---|---|---|---|---|")
    for text in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] == "launch":
            for row in rows(line):
                print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
