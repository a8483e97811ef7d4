"""Reads an engine's log as a stream: one pass, memory that does not grow with it. The last launch in it counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TextIO

from ep2tp.observe import ep2tp_log, sglang_log, vllm_log
from ep2tp.observe.envelope import opened
from ep2tp.observe.evidence import Evidence, Reading, Strength
from ep2tp.observe.nccl import NcclLog
from ep2tp.observe.signs import Sign

_TABLES = (("vllm", vllm_log), ("sglang", sglang_log), (None, ep2tp_log))
_SIGNS: tuple[tuple[str | None, Sign], ...] = tuple((engine, sign) for engine, table in _TABLES for sign in table.SIGNS)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_LINE = 1 << 20
_MOST_EVIDENCE = 100  # of one launch; engines print a handful, and ranks repeat one another
_SHOWN = 160


# vLLM logs its arguments once for a launch; SGLang's may come twice, and after lines on how they were resolved.
_BEGINNING = frozenset({"arguments"})
_BEFORE_WORKERS, _OF_WORKERS = frozenset({"server_args", "adjusted", "dwdp"}), frozenset({"scheduler", "warmup"})


@dataclass
class _Launch:
    """The evidence of one launch, by sign and meaning: ranks that say the same count as one."""

    number: int = 1
    found: dict[tuple[str, str], Evidence] = field(default_factory=dict)

    def ends_before(self, sign: Sign) -> bool:
        """Whether a line of this sign belongs to the next launch."""
        has_workers = any(name in _OF_WORKERS for name, _ in self.found)
        return bool(self.found) and (sign.name in _BEGINNING or (sign.name in _BEFORE_WORKERS and has_workers))

    def add(self, sign: Sign, reading: Reading, line: int, text: str, engine: str | None) -> None:
        if sign.is_last_valid:
            for key in [key for key in self.found if key[0] == sign.name]:
                del self.found[key]
        key = (sign.name, reading.says)
        if key not in self.found and len(self.found) < _MOST_EVIDENCE:
            self.found[key] = Evidence(reading, _excerpt(text, sign.anchor), line, engine)


def read_log(stream: TextIO) -> Iterator[Evidence]:
    """Evidence from the last launch in a log of vLLM or SGLang, and from NCCL's lines in it.

    Args:
        stream: text, opened with ``errors="replace"``.
    """
    launch, nccl = _Launch(), NcclLog()
    for number, raw in opened(_lines(stream)):
        if "NCCL INFO" in raw:
            nccl.feed(number, raw)
            continue
        line = None
        for engine, sign in _SIGNS:
            if sign.anchor not in raw:
                continue
            line = _COLOURS.sub("", raw).rstrip() if line is None else line
            match = sign.pattern.search(line)
            reading = sign.read(match) if match else None
            if reading is None:
                continue
            if launch.ends_before(sign):
                launch, nccl = _Launch(launch.number + 1), NcclLog()
            launch.add(sign, reading, number, line, engine)
    in_order = sorted(launch.found.values(), key=lambda piece: piece.line or 0)
    if launch.number > 1:
        says = f"the last of {launch.number} launches in this log begins here; the earlier ones do not count"
        yield Evidence(Reading(says, strength=Strength.NOTE), in_order[0].text, in_order[0].line)
    yield from in_order
    yield from _conclusions(launch)
    yield from nccl.evidence()


def _lines(stream: TextIO) -> Iterator[tuple[int, str]]:
    """Numbered lines; what is beyond a mebibyte of one line is skipped."""
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        yield number, line
        while line and not line.endswith("\n"):
            line = stream.readline(_LONGEST_LINE)


def _conclusions(launch: _Launch) -> Iterator[Evidence]:
    for engine, table in _TABLES:
        found = [(name, piece.reading) for (name, _), piece in launch.found.items() if piece.engine == engine]
        if reading := table.conclude(found):
            yield Evidence(reading, "(a line that is missing)", None, engine)


def _excerpt(line: str, anchor: str) -> str:
    """The part of a line around its anchor."""
    if len(line) <= _SHOWN:
        return line
    start = max(0, line.find(anchor) - 60)
    return ("..." if start else "") + line[start : start + _SHOWN] + ("..." if start + _SHOWN < len(line) else "")


def with_source(evidence: Iterable[Evidence], source: str) -> Iterator[Evidence]:
    """The evidence with its source's name in the text, for verdicts over several sources."""
    return (replace(piece, text=f"{source}: {piece.text}") for piece in evidence)
