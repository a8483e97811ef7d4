"""One verdict out of those of two engines. In plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ep2tp.planner.choice import headline
from ep2tp.planner.compare import Assessment, Question
from ep2tp.planner.launch import launches

WHICH_VLLM = (
    "vLLM means 0.32 and later here: it slices these routed experts exactly by itself. For an older vLLM, ep2tp pads "
    "them as it does in SGLang, whose figures of TP and TPxPP hold there."
)


def merged(in_vllm: Sequence[list[str]], in_sglang: Sequence[list[str]]) -> list[list[str]]:
    """Sections of sentences; what is said of one engine only begins with its name."""
    empty: list[str] = []
    return [merged_lines(mine, other) for mine, other in zip_longest(in_vllm, in_sglang, fillvalue=empty)]


def merged_lines(in_vllm: list[str], in_sglang: list[str]) -> list[str]:
    """The sentences of one section, those of both engines last."""
    found = [f"vLLM: {line}" for line in in_vllm if line and line not in in_sglang]
    found += [f"SGLang: {line}" for line in in_sglang if line and line not in in_vllm]
    return found + [line for line in in_vllm if line and line in in_sglang]


def other_choices(
    question: Question,
    assessed: Sequence[Assessment],
    best: Assessment | None,
    chosen: Mapping[str, Assessment | None],
) -> list[str]:
    """What an engine runs that does not run the best plan, and why; nothing for one that runs no plan."""
    found = []
    for engine, own in chosen.items():
        if best is None or own is None or own is best:
            continue
        running = [a for a in assessed if a.runs_in(engine)]
        why = launches(question, best)[engine.lower()].note
        found.append(
            f"{engine} does not run {best.layout}: {why}. Of what it runs, {headline(question, running, own)[0]}"
        )
    return found
