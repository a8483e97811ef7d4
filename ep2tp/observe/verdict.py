"""Puts the evidence together: the plan that fits all of it, how sure that is, and what contradicts it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ep2tp.observe.evidence import ANY, Evidence, Plan, Plans, Strength

_CONFIDENCE = {Strength.DECISIVE: "high", Strength.SUPPORT: "medium", Strength.HINT: "low", Strength.NOTE: "low"}


@dataclass(frozen=True)
class Verdict:
    """Which plan is active.

    Attributes:
        plan: the one plan that fits; ``unknown`` where several do, ``mixed`` for hybrids and where decisive evidence
            disagrees (parts of the launch run under different plans).
        fits: all plans that fit.
        confidence: ``high``, ``medium`` or ``low``.
        engine: ``vllm``, ``sglang``, or None where nothing names it.
        evidence: in the order it was read.
        contradictions: for a piece of evidence (by its position), the position of one that it disagrees with.
    """

    plan: Plan
    fits: Plans
    confidence: str
    engine: str | None
    evidence: tuple[Evidence, ...]
    contradictions: dict[int, int]


def judge(evidence: Iterable[Evidence]) -> Verdict:
    """Narrow the plans down, strongest evidence first; weaker evidence never overrules stronger."""
    found = tuple(evidence)
    fits, settled_by, contradictions = ANY, Strength.NOTE, {}
    for strength in (Strength.DECISIVE, Strength.SUPPORT, Strength.HINT):
        for i, piece in enumerate(found):
            if piece.reading.strength is not strength:
                continue
            narrowed = fits & piece.reading.plans
            if not narrowed:
                contradictions[i] = _opponent(found, i)
            elif narrowed != fits:
                fits, settled_by = narrowed, strength
    worst = max((found[i].reading.strength for i in contradictions), default=Strength.NOTE)
    engine = next((piece.engine for piece in found if piece.engine), None)
    if worst is Strength.DECISIVE:
        return Verdict(Plan.MIXED, frozenset({Plan.MIXED}), "low", engine, found, contradictions)
    plan = next(iter(fits)) if len(fits) == 1 else Plan.UNKNOWN
    confidence = _CONFIDENCE[settled_by] if plan is not Plan.UNKNOWN else "low"
    if worst is Strength.SUPPORT and confidence == "high":
        confidence = "medium"
    return Verdict(plan, fits, confidence, engine, found, contradictions)


def _opponent(found: Sequence[Evidence], at: int) -> int:
    """The strongest piece of evidence that allows no plan in common with ``found[at]``, else the strongest at all."""
    others = [i for i, piece in enumerate(found) if i != at and piece.reading.strength >= found[at].reading.strength]
    disjoint = [i for i in others if not found[i].reading.plans & found[at].reading.plans]
    return max(disjoint or others, key=lambda i: found[i].reading.strength)
