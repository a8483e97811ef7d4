"""The comparison as an image: time per token by batch for each plan, stacked by what it is spent on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ep2tp.errors import Ep2tpError
from ep2tp.planner.compare import Assessment, Question

_PARTS = {"weights": "#4c72b0", "cache": "#8fb3d9", "straggler": "#dd8452", "communication": "#55a868"}
_NAMES = {"cache": "KV cache", "straggler": "busiest rank"}


def check_matplotlib() -> None:
    """Make sure that matplotlib is there, before anything is computed.

    Raises:
        Ep2tpError: it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Ep2tpError("--plot needs matplotlib: pip install 'ep2tp[plot]'") from None


def plot(question: Question, assessed: Sequence[Assessment], path: Path) -> None:
    """Write the image; the file's suffix says its format.

    Raises:
        Ep2tpError: the format is unknown, or the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.6 + 0.42 * len(assessed) * len(question.batches), 5.2), layout="constrained")
    axes = figure.subplots(1, len(question.batches), squeeze=False)[0]
    names = [str(a.layout) for a in assessed]
    for panel, batch in zip(axes, question.batches, strict=True):
        bottom = [0.0] * len(assessed)
        for part, colour in _PARTS.items():
            heights = [getattr(a.decode[batch], part) for a in assessed]
            panel.bar(names, heights, bottom=bottom, color=colour, width=0.75)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for place, (a, top) in enumerate(zip(assessed, bottom, strict=True)):
            possible = a.runs and a.holds(batch)
            note = f"{top:.1f}" if possible else "no KV\nroom" if a.runs else "does\nnot run"
            panel.text(place, top, note, ha="center", va="bottom", fontsize=8 if possible else 7)
            if not possible:
                for bar in panel.containers:
                    bar[place].set_alpha(0.35)
        panel.set_title(f"batch {batch}", fontsize=11)
        panel.tick_params(axis="x", rotation=60, labelsize=9)
        panel.set_ylim(top=1.13 * max(bottom))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms a token (computed bound)")
    handles = [Patch(color=colour, label=_NAMES.get(part, part)) for part, colour in _PARTS.items()]
    axes[-1].legend(handles=handles, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(
        f"{Path(question.facts.source).name} on {question.gpus} x {question.gpu.name}, {question.link.name}, "
        f"context {question.context}",
        fontsize=12,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise Ep2tpError(f"--plot {path}: {error}") from None
