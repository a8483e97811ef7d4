"""Where plans with whole experts are the better ones. In plain words."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from ep2tp.planner.choice import fastest
from ep2tp.planner.compare import Assessment, Question, decode_at
from ep2tp.planner.divisibility import kv_copies

PLANS = ("TEP", "DEP", "TPxEP")
_LARGER = (16, 64, 256, 1024)
_CLEAR = 1.05  # below 5% the figures do not tell two plans apart


def batches_won(question: Question, running: Sequence[Assessment]) -> dict[int, Assessment]:
    """The batches asked for at which a plan with whole experts is clearly the fastest, or the only one with room.

    Empty where no plan that slices every expert runs: then expert parallelism is not better but unavoidable.
    """
    sliced = [a for a in running if a.layout.plan not in PLANS]
    found = {}
    for batch in question.batches:
        winner = fastest(running, batch)
        if winner is None or winner.layout.plan not in PLANS or not sliced:
            continue
        rival = min((a.decode[batch].total for a in sliced if a.holds(batch)), default=inf)
        if rival > _CLEAR * winner.decode[batch].total:
            found[batch] = winner
    return found


def where_they_win(question: Question, running: Sequence[Assessment], won: dict[int, Assessment]) -> str:
    """At which of the batches asked for they are better and why, or else from which larger batch on; empty for none."""
    return _why_they_win(question, running, won) if won else _where_they_would_win(question, running)


def where_they_do_not(question: Question, running: Sequence[Assessment]) -> list[str]:
    """Up to which batch they were compared, where they win at none."""
    held = _held(question, running)
    if not held or len({a.layout.plan in PLANS for a in running}) < 2:
        return []
    beyond = [batch for batch in _batches(question) if batch not in held]
    return [
        f"No plan with whole experts that fits is clearly faster up to batch {held[-1]} at this context and link"
        + (f"; none holds batch {beyond[0]}." if beyond else ".")
    ]


def _why_they_win(question: Question, running: Sequence[Assessment], won: dict[int, Assessment]) -> str:
    batch, winner = max(won.items())
    rival = next((a for a in running if a.layout.plan == "TP"), None)
    text = f"Expert parallelism is the better plan at batch {', '.join(map(str, won))} ({winner.layout})"
    if rival is None:
        return text + "."
    if not rival.holds(batch):
        copies = kv_copies(question.facts, rival.layout)
        why = f", since {copies} ranks hold the same KV cache" if copies > 1 else ""
        return f"{text}: {rival.layout} holds {rival.sequences} sequences of this context at once{why}."
    there, here = rival.decode[batch], winner.decode[batch]
    causes = {
        f"under TP {kv_copies(question.facts, rival.layout)} ranks hold and read the same KV cache": (
            there.cache - here.cache
        ),
        "TP reads padding": there.weights - here.weights if rival.weights.padding else 0.0,
        "TP reads more weights a rank": there.weights - here.weights if not rival.weights.padding else 0.0,
        "TP communicates more": there.communication - here.communication,
    }
    cause, cost = max(causes.items(), key=lambda item: item[1])
    return f"{text}: {cause} (+{cost:.2f} ms at batch {batch})."


def _where_they_would_win(question: Question, running: Sequence[Assessment]) -> str:
    whole = [a for a in running if a.layout.plan in PLANS]
    sliced = [a for a in running if a.layout.plan not in PLANS]
    for batch in (b for b in _held(question, running) if b > question.batches[-1] and sliced):
        times = {str(a.layout): decode_at(question, a, batch).total for a in whole if a.holds(batch)}
        rival = min((decode_at(question, a, batch).total for a in sliced if a.holds(batch)), default=inf)
        if times and rival > _CLEAR * min(times.values()):
            winner = min(times, key=lambda name: times[name])
            why = "" if rival < inf else "; no plan that slices every expert holds as many sequences"
            return f"Expert parallelism becomes the better plan from about batch {batch} ({winner}){why}."
    return ""


def _batches(question: Question) -> list[int]:
    """Those asked for, and larger ones."""
    return [*question.batches, *(batch for batch in _LARGER if batch > question.batches[-1])]


def _held(question: Question, running: Sequence[Assessment]) -> list[int]:
    return [batch for batch in _batches(question) if any(a.holds(batch) for a in running)]
