"""The choice among plans that run: the least decode time, over the batches for which there is KV room."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from ep2tp.planner.compare import Assessment, Question


def held_batches(question: Question, assessed: Assessment) -> list[int]:
    """The batches asked for that a plan's KV cache holds at once."""
    return [batch for batch in question.batches if assessed.holds(batch)]


def fastest(assessed: Sequence[Assessment], batch: int) -> Assessment | None:
    """The plan with the shortest decode step of those that hold a batch; within 2%, the one that comes first.

    None where no plan holds it.
    """
    holding = [a for a in assessed if a.holds(batch)]
    least = min((a.decode[batch].total for a in holding), default=0.0)
    return next((a for a in holding if a.decode[batch].total <= 1.02 * least), None)


def best_plan(question: Question, running: Sequence[Assessment]) -> Assessment:
    """The plan to run.

    Of the plans that hold the most of the batches asked for, the one with the least geometric mean of decode times over
    these; within 2%, the one that comes first. Where none holds any batch, the one with room for the most sequences.
    """
    most = max(len(held_batches(question, a)) for a in running)
    if most == 0:
        return max(running, key=lambda a: a.sequences)
    batches = question.batches[:most]  # they rise, so that plans which hold as many hold the same
    holding = [a for a in running if a.holds(batches[-1])]
    scores = [sum(log(a.decode[batch].total) for batch in batches) for a in holding]
    least = min(scores)
    return next(a for a, score in zip(holding, scores, strict=True) if score <= least + log(1.02) * most)


def headline(question: Question, running: Sequence[Assessment], best: Assessment) -> list[str]:
    """Why it is the best plan, and which batches no plan holds."""
    most = max(running, key=lambda a: a.sequences)
    unheld = [batch for batch in question.batches if not most.holds(batch)]
    if len(unheld) == len(question.batches):
        return [
            f"{best.layout}: no plan that fits holds {unheld[0]} sequences of this context at once; this one holds the "
            f"most, {best.sequences}."
        ]
    found = [f"{best.layout}: {_why(question, running, best)}."]
    if unheld:
        found.append(
            f"No plan that fits holds batch {', '.join(map(str, unheld))} of this context at once; {most.layout} holds "
            f"the most, {most.sequences}."
        )
    return found


def _why(question: Question, running: Sequence[Assessment], best: Assessment) -> str:
    batches = held_batches(question, best)
    others = [a for a in running if a is not best]
    without_room = [a for a in others if not a.holds(batches[-1])]
    over = f"at batch {batches[0]}" if len(batches) == 1 else f"over batches {', '.join(map(str, batches))}"
    if not without_room:
        return f"the least decode time of the plans that fit, {over}"
    if len(without_room) == len(others):
        why = f"the only plan whose KV cache holds {batches[-1]} sequences of this context at once"
    else:
        why = f"the least decode time of the plans whose KV cache holds {batches[-1]} sequences at once, {over}"
    faster = [a for a in without_room if _is_faster(question, a, best)]
    if not faster:
        return why
    rival = min(faster, key=lambda a: a.decode[batches[0]].total)
    return f"{why}; {rival.layout} is faster at smaller batches, but holds {rival.sequences}"


def _is_faster(question: Question, assessed: Assessment, best: Assessment) -> bool:
    """Clearly faster at some batch that it holds."""
    batches = held_batches(question, assessed)
    return any(1.02 * assessed.decode[batch].total < best.decode[batch].total for batch in batches)
