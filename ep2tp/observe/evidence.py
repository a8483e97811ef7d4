"""What tells which parallel plan is active: one type for every kind of source."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Plan(StrEnum):
    """How a MoE model is spread over its ranks."""

    TP = "TP"  # every expert sliced over all ranks; all_reduce
    TEP = "TEP"  # whole experts per rank, every token on every rank; all_reduce
    DEP = "DEP"  # whole experts per rank, tokens dispatched to them and combined
    MIXED = "mixed"  # a hybrid of these, or sliced experts under data-parallel attention
    UNKNOWN = "unknown"


Plans = frozenset[Plan]

ANY: Plans = frozenset({Plan.TP, Plan.TEP, Plan.DEP, Plan.MIXED})
TP: Plans = frozenset({Plan.TP})
TEP: Plans = frozenset({Plan.TEP})
DEP: Plans = frozenset({Plan.DEP})
MIXED: Plans = frozenset({Plan.MIXED})
ALL_REDUCE: Plans = TP | TEP
SLICED: Plans = TP | MIXED
DISPATCHED: Plans = DEP | MIXED
WHOLE: Plans = TEP | DEP


class Strength(IntEnum):
    """How far a piece of evidence goes."""

    NOTE = 0  # says nothing about the plan: context, or a line that is often misread
    HINT = 1  # what was asked for, or what is merely usual
    SUPPORT = 2  # seldom has another cause
    DECISIVE = 3  # the engine's own statement, or what it was seen to do


@dataclass(frozen=True)
class Reading:
    """What a line (or an endpoint, a process, a trace) says.

    Attributes:
        says: the meaning in words.
        plans: the plans that fit it.
        strength: how far it goes.
    """

    says: str
    plans: Plans = ANY
    strength: Strength = Strength.DECISIVE


@dataclass(frozen=True)
class Evidence:
    """A reading, and where it was read.

    Attributes:
        reading: what it says.
        text: the words it was read from, shortened.
        line: 1-based line number; None where the source has no lines.
        engine: ``vllm`` or ``sglang`` where it tells the engine.
    """

    reading: Reading
    text: str
    line: int | None = None
    engine: str | None = None
