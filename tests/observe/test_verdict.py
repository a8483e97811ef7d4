"""How evidence is weighed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ep2tp.observe.evidence import ANY, DEP, TEP, TP, WHOLE, Evidence, Plan, Plans, Reading, Strength
from ep2tp.observe.verdict import judge


def evidence(plans: Plans, strength: Strength = Strength.DECISIVE) -> Evidence:
    return Evidence(Reading("says", plans, strength), "text", 1)


PLANS = st.frozensets(st.sampled_from(sorted(ANY)), min_size=1)
PIECES = st.lists(st.builds(evidence, PLANS, st.sampled_from(list(Strength))), max_size=8)


def test_several_plans_that_fit_are_unknown() -> None:
    verdict = judge([evidence(WHOLE)])
    assert (verdict.plan, verdict.fits, verdict.confidence) == (Plan.UNKNOWN, WHOLE, "low")


def test_confidence_is_that_of_the_evidence_that_settles_it() -> None:
    assert judge([evidence(TP)]).confidence == "high"
    assert judge([evidence(WHOLE), evidence(TEP, Strength.SUPPORT)]).confidence == "medium"
    assert judge([evidence(DEP, Strength.HINT)]).confidence == "low"


def test_support_that_disagrees_lowers_confidence_and_is_named() -> None:
    verdict = judge([evidence(DEP, Strength.SUPPORT), evidence(TP)])
    assert (verdict.plan, verdict.confidence, verdict.contradictions) == (Plan.TP, "medium", {0: 1})


def test_decisive_evidence_that_disagrees_is_mixed() -> None:
    verdict = judge([evidence(TP), evidence(WHOLE)])
    assert (verdict.plan, verdict.confidence, verdict.contradictions) == (Plan.MIXED, "low", {1: 0})


@given(pieces=PIECES)
def test_the_verdict_fits_all_that_is_not_contradicted(pieces: list[Evidence]) -> None:
    verdict = judge(pieces)
    assert verdict.fits
    assert (verdict.plan is Plan.UNKNOWN) == (len(verdict.fits) > 1)
    decisive = [i for i in verdict.contradictions if pieces[i].reading.strength is Strength.DECISIVE]
    if not decisive:
        for i, piece in enumerate(pieces):
            relevant = piece.reading.strength is not Strength.NOTE
            assert not relevant or i in verdict.contradictions or verdict.fits <= piece.reading.plans


@given(pieces=PIECES)
def test_notes_change_nothing(pieces: list[Evidence]) -> None:
    kept = [piece for piece in pieces if piece.reading.strength is not Strength.NOTE]
    assert judge(kept).fits == judge(pieces).fits
