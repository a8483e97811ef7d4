"""The verdict: which plan, why, and when expert parallelism is the better or the only one. In plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

from ep2tp.planner.compare import Assessment, Question, decode_at, fastest
from ep2tp.planner.divisibility import kv_copies, slices_below_block
from ep2tp.planner.launch import Launch, launches, longest_context, nccl_settings
from ep2tp.planner.memory import GB, usable_bytes

_EP = ("TEP", "DEP", "TPxEP")
_LARGER = (16, 64, 256, 1024)
_CLEAR = 1.05  # below 5% the figures do not tell two plans apart


@dataclass(frozen=True)
class Verdict:
    """What to run.

    Attributes:
        best: the plan, or None where none fits.
        by_batch: the fastest plan of each batch.
        reasons: sentences, the most important first.
        ep_is_better: whether a plan with whole experts is clearly the fastest at some batch.
        ep_is_unavoidable: whether only plans with whole experts run.
        commands: launches of the best plan, by engine.
    """

    best: Assessment | None
    by_batch: dict[int, Assessment]
    reasons: tuple[str, ...]
    ep_is_better: bool
    ep_is_unavoidable: bool
    commands: dict[str, Launch]


def advise(question: Question, assessed: Sequence[Assessment]) -> Verdict:
    """Choose among assessed plans: the least geometric mean of decode times over the batches asked for."""
    running = [a for a in assessed if a.runs]
    if not running:
        return Verdict(None, {}, tuple(_nothing_runs(question, assessed)), False, False, {})
    by_batch = {batch: fastest(running, batch) for batch in question.batches}
    best = _best(question, running)
    sliced = [a for a in running if a.layout.plan not in _EP]
    unavoidable = not sliced
    better = _batches_where_ep_wins(question, running, sliced)
    reasons = [_headline(best, unavoidable)]
    reasons += _context(question)
    reasons += _comparison(question, running, best)
    reasons += _where_ep_wins(question, running, better) or _where_ep_would_win(question, running, sliced)
    reasons += _what_does_not_run(question, assessed)
    reasons += _padding(question, best)
    return Verdict(best, by_batch, tuple(reasons), bool(better), unavoidable, launches(question, best))


def _best(question: Question, running: Sequence[Assessment]) -> Assessment:
    held = [sum(a.holds(batch) for batch in question.batches) for a in running]
    running = [a for a, count in zip(running, held, strict=True) if count == max(held)]
    scores = [sum(log(a.decode[batch].total) for batch in question.batches) for a in running]
    least = min(scores)
    tolerance = log(1.02) * len(question.batches)  # closer than 2%: the simpler plan, which comes first
    return next(a for a, score in zip(running, scores, strict=True) if score <= least + tolerance)


def _headline(best: Assessment, unavoidable: bool) -> str:
    if unavoidable:
        return f"{best.layout}: expert parallelism is unavoidable here; no plan that slices every expert runs."
    return f"{best.layout}: the least decode time of the plans that fit, over the batches asked for."


def _context(question: Question) -> list[str]:
    most = longest_context(question)
    if question.context <= most:
        return []
    return [
        f"Context {question.context} is beyond this model's max_position_embeddings, {most}: the figures are for "
        f"{question.context}, the launches for {most}, since engines refuse more."
    ]


def _comparison(question: Question, running: Sequence[Assessment], best: Assessment) -> list[str]:
    small, large = question.batches[0], question.batches[-1]
    found = []
    for plan in ("TP", "TEP", "DEP"):
        other = next((a for a in running if a.layout.plan == plan and a is not best), None)
        if other is None or best.layout.plan == plan:
            continue
        parts = [f"{_times(other, best, b)} at batch {b}" for b in dict.fromkeys((small, large))]
        found.append(f"{other.layout} takes {' and '.join(parts)}{_because(question, other, best, small)}.")
    return found


def _times(other: Assessment, best: Assessment, batch: int) -> str:
    ratio = other.decode[batch].total / best.decode[batch].total
    return f"{ratio:.2f}x the time"


def _because(question: Question, other: Assessment, best: Assessment, batch: int) -> str:
    there, here = other.decode[batch], best.decode[batch]
    if there.total <= here.total:
        return ""
    causes = {
        f"its busiest rank reads {other.straggler[batch]:.2f}x the experts of the mean one": (
            there.straggler - here.straggler
        ),
        "its collectives take longer": there.communication - here.communication,
        _why_weights(other): there.weights - here.weights,
        "it reads more KV cache a rank": there.cache - here.cache,
    }
    cause, cost = max(causes.items(), key=lambda item: item[1])
    return f": at batch {batch}, {cause} (+{cost:.2f} ms)" if cost > 0.01 * here.total else ""


def _why_weights(other: Assessment) -> str:
    if other.layout.dp > 1:
        return "every rank reads all of attention and the shared experts"
    return "it reads padding" if other.weights.padding else "a rank reads more weights"


def _batches_where_ep_wins(
    question: Question, running: Sequence[Assessment], sliced: Sequence[Assessment]
) -> dict[int, Assessment]:
    found = {}
    for batch in question.batches:
        winner = fastest(running, batch)
        if winner.layout.plan in _EP and sliced:
            rival = min((a.decode[batch].total for a in sliced if a.holds(batch)), default=inf)
            if rival > _CLEAR * winner.decode[batch].total:
                found[batch] = winner
    return found


def _where_ep_wins(question: Question, running: Sequence[Assessment], better: dict[int, Assessment]) -> list[str]:
    if not better:
        return []
    batch, winner = max(better.items())
    rival = next((a for a in running if a.layout.plan == "TP"), None)
    text = f"Expert parallelism is the better plan at batch {', '.join(map(str, better))} ({winner.layout})"
    if rival is None:
        return [text + "."]
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
    return [f"{text}: {cause} (+{cost:.2f} ms at batch {batch})."]


def _where_ep_would_win(question: Question, running: Sequence[Assessment], sliced: Sequence[Assessment]) -> list[str]:
    """From which larger batch on whole experts are clearly faster, if from any."""
    whole = [a for a in running if a.layout.plan in _EP]
    if not sliced or not whole:
        return []
    for batch in (b for b in _LARGER if b > question.batches[-1]):
        held = [a for a in whole if a.holds(batch)]
        times = {str(a.layout): decode_at(question, a, batch).total for a in held}
        rival = min((decode_at(question, a, batch).total for a in sliced if a.holds(batch)), default=inf)
        if times and rival > _CLEAR * min(times.values()):
            winner = min(times, key=lambda name: times[name])
            return [f"Expert parallelism becomes the better plan from about batch {batch} ({winner})."]
    most = max(_LARGER[-1], question.batches[-1])
    return [f"No plan with whole experts that fits is clearly faster up to batch {most} at this context and link."]


def _what_does_not_run(question: Question, assessed: Sequence[Assessment]) -> list[str]:
    found = []
    for a in assessed:
        if a.layout.plan not in ("TP", "TEP", "DEP"):
            continue
        if a.blockers:
            found.append(f"{a.layout} cannot run: {a.blockers[0]}.")
        elif not a.fits:
            usable = usable_bytes(question.gpu.memory_gb) / GB
            need = (a.weights.total + a.cache) / GB
            found.append(
                f"{a.layout} does not fit: {need:.1f} GB of weights and one sequence's KV cache in {usable:.1f} GB."
            )
    return found


def _padding(question: Question, best: Assessment) -> list[str]:
    found = []
    if best.weights.padding:
        found.append(
            f"ep2tp pads what does not divide: +{best.weights.padding_share:.1%} of the MLP weights, "
            f"{best.weights.padding / GB:.2f} GB a GPU."
        )
    found += [
        f"A slice of the {c.name} weights ({c.size}) is smaller than one block of {c.block}: some ranks hold nothing "
        "but padding; whole experts, or fewer ranks with pipeline stages, use the GPUs better."
        for c in slices_below_block(question.facts, best.layout)
    ]
    if nccl_settings(question.link)[2]:
        found.append(f"NCCL: {nccl_settings(question.link)[2]}.")
    return found


def _nothing_runs(question: Question, assessed: Sequence[Assessment]) -> list[str]:
    least = min(assessed, key=lambda a: a.weights.total + a.cache)
    usable = usable_bytes(question.gpu.memory_gb) / GB
    found = [
        f"No plan fits: {least.layout} needs least, {(least.weights.total + least.cache) / GB:.1f} GB a GPU, and "
        f"{usable:.1f} GB of a {question.gpu.name} are usable. Use more GPUs, a smaller quantisation or less --context."
    ]
    return found + [f"{a.layout} cannot run: {a.blockers[0]}." for a in assessed if a.blockers and a.fits]
