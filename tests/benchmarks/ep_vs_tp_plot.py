"""The results of ep_vs_tp.py as an image: ``ep_vs_tp_plot.py OUT.png RESULTS.jsonl...``.

A row for each link, a panel for each batch and one for prefill; a bar is the measured median with its spread, the mark
on it the planner's bound. A hatched one is too short (``shares_experts`` in ep_vs_tp_table.py) and has no mark.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ep_vs_tp_table import launches, shares_experts
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

_COLOURS = {"TP": "#4c72b0", "TEP": "#dd8452", "DEP": "#55a868", "TEP-rewritten": "#8fb3d9", "DEP-rewritten": "#b9cfe6"}


def plot(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write the image of some launches that ran."""
    links = list(dict.fromkeys(line["link"] for line in lines))
    parts = [*lines[0]["decode"], "prefill"]
    figure = Figure(figsize=(2.3 * len(parts), 0.7 + 2.5 * len(links)), layout="constrained")
    panels = figure.subplots(len(links), len(parts), squeeze=False)
    for row, link in zip(panels, links, strict=True):
        shown = [line for line in lines if line["link"] == link]
        for panel, part in zip(row, parts, strict=True):
            for place, line in enumerate(shown):
                _bar(panel, place, line, part)
            panel.set_title(part if part == "prefill" else f"{link}, batch {part}", fontsize=10)
            panel.set_xticks([])
            panel.set_ylim(bottom=0)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("ms")
    names = [name for name in _COLOURS if any(line["launch"] == name for line in lines)]
    handles: list[Any] = [Patch(color=_COLOURS[name], label=name) for name in names]
    if any(map(shares_experts, lines)):
        handles.append(Patch(facecolor="#999999", edgecolor="white", hatch="//", label="too few experts hit"))
    handles.append(Line2D([], [], color="black", linewidth=2, label="planner's bound"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _bar(panel: Any, place: int, line: dict[str, Any], part: str) -> None:
    found = line["prefill"] if part == "prefill" else line["decode"][part]
    planner = line["planner"]["built_in"]
    bound = planner["prefill"] if part == "prefill" else planner["decode"][part]
    spread = [[found["ms"] - found["least"]], [found["most"] - found["ms"]]]
    is_short = part != "prefill" and shares_experts(line)
    look = {"color": _COLOURS[line["launch"]], "ecolor": "#555555", "hatch": "//" if is_short else None}
    panel.bar(place, found["ms"], yerr=spread, width=0.8, capsize=2, edgecolor="white", **look)
    if not is_short:
        panel.plot([place - 0.4, place + 0.4], [bound["ms"]] * 2, color="black", linewidth=2)


def main() -> None:
    """Draw the files."""
    paths = [Path(name) for name in sys.argv[2:]]
    lines = [line for line in launches(paths) if "decode" in line]
    plot(lines, f"{paths[0].stem}: milliseconds between tokens, and of a prompt of 2,048", Path(sys.argv[1]))


if __name__ == "__main__":
    main()
