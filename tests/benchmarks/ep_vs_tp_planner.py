"""What ``ep2tp plan`` computes for a launch that ep_vs_tp.py timed, and how far off it is.

ep_vs_tp_planner.py RESULTS.jsonl...       computes the figures of stored results again, with this planner
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ep2tp.planner.compare import Assessment, Question, assess
from ep2tp.planner.gpus import find_gpu
from ep2tp.planner.layouts import Layout
from ep2tp.planner.links import built_in
from ep2tp.planner.machine import choose_gpu
from ep2tp.planner.memory import GB
from ep2tp.planner.profile import Profile, read_profile
from ep2tp.planner.source import load_model


def layout_of(launch: str, ranks: int) -> Layout:
    """The plan that runs: a rewritten launch is TP."""
    plans = {"TEP": Layout("TEP", tp=ranks, ep=ranks), "DEP": Layout("DEP", ep=ranks, dp=ranks)}
    return plans.get(launch, Layout("TP", tp=ranks))


def figures(
    machine: dict[str, Any], line: dict[str, Any], profile: Profile | None, gpu: str | None = None
) -> dict[str, Any]:
    """The planner's figures for a launch, with the built-in link and with a measured one, each with its error.

    Args:
        machine: the results' first line: ``config``, ``prompt``, ``steps``, ``prefill``.
        line: the launch's.
        profile: the link as measured, if it was.
        gpu: the card's name; this machine's, if not given.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(machine["config"]), encoding="utf-8")
        facts, inventory = load_model(str(path))
    card = find_gpu(gpu) if gpu else choose_gpu(None, None)
    link = built_in().get(line["link"], built_in()["host"])
    batches = tuple(int(batch) for batch in line["decode"])
    context = machine["prompt"] + machine["steps"] // 2
    question = Question(facts, inventory, line["ranks"], card, link, batches, context, machine["prefill"])
    layout = layout_of(line["launch"], line["ranks"])
    found = {"built_in": _compared(assess(question, layout), line)}
    if profile is not None:
        measured = replace(card, bandwidth=profile.bandwidth or card.bandwidth)
        found["calibrated"] = _compared(assess(replace(question, link=profile.link, gpu=measured), layout), line)
    return found


def _compared(assessed: Assessment, line: dict[str, Any]) -> dict[str, Any]:
    """Computed figures, each with its error: computed over measured, less one."""
    weights = assessed.weights.total / GB
    return {
        "weights_gb": round(weights, 3),
        "weights_error": _error(weights, line["weights_gb"]),
        "decode": {
            batch: {"ms": round(step.total, 4), **_parts(step), "error": _error(step.total, found["ms"])}
            for (batch, found), step in zip(line["decode"].items(), assessed.decode.values(), strict=True)
        },
        "prefill": {
            "ms": round(assessed.prefill.total, 4),
            **_parts(assessed.prefill),
            "error": _error(assessed.prefill.total, line["prefill"]["ms"]),
        },
    }


def _parts(step: Any) -> dict[str, float]:
    return {part: round(value, 4) for part, value in vars(step).items()}


def _error(computed: float, measured: float) -> float | None:
    return round(computed / measured - 1, 4) if measured > 0 else None


def _stored_profile(stored: dict[str, Any]) -> Profile:
    """The profile that a results line holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps(stored), encoding="utf-8")
        return read_profile(path)


Planner = Callable[[dict[str, Any]], dict[str, Any]]


def with_planner(path: Path) -> Iterator[tuple[dict[str, Any], Planner]]:
    """The lines of a results file, each with :func:`figures` for launches of its machine and links measured so far."""
    machine: dict[str, Any] = {}
    profiles: dict[str, Profile] = {}

    def planner(launch: dict[str, Any]) -> dict[str, Any]:
        card = machine["gpus"].splitlines()[1].split(",")[0]
        return figures(machine, launch, profiles.get(launch["link"]), card)

    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["kind"] == "machine":
            machine, profiles = line, {}
        elif line["kind"] == "calibration" and "profile" in line:
            profiles[line["link"]] = _stored_profile(line["profile"])
        yield line, planner


def recomputed(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a results file, with the figures of this planner."""
    for line, planner in with_planner(path):
        if "planner" in line:
            line["planner"] = planner(line)
        yield line


def main() -> None:
    """Write the files again."""
    for path in map(Path, sys.argv[1:]):
        lines = "".join(json.dumps(line) + "\n" for line in recomputed(path))
        path.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
