"""Reads an engine's log as a stream: one pass, memory that does not grow with it. The last launch in it counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TextIO

from ep2tp.observe import ep2tp_log, sglang_log, vllm_log
from ep2tp.observe.evidence import Evidence, Reading, Strength
from ep2tp.observe.nccl import NcclLog
from ep2tp.observe.signs import Sign

_TABLES = (("vllm", vllm_log), ("sglang", sglang_log), (None, ep2tp_log))
_SIGNS: tuple[tuple[str | None, Sign], ...] = tuple((engine, sign) for engine, table in _TABLES for sign in table.SIGNS)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_LINE = 1 << 20
_MOST_EVIDENCE = 100  # of one launch; engines print a handful, and ranks repeat one another
_SHOWN = 160


@dataclass
class _Launch:
    """The evidence of one launch, by sign and meaning: ranks that say the same count as one."""

    found: dict[tuple[str, str], Evidence]
    begins: int

    def add(self, sign: Sign, reading: Reading, line: int, text: str, engine: str | None) -> None:
        if sign.is_last_valid:
            for key in [key for key in self.found if key[0] == sign.name]:
                del self.found[key]
        key = (sign.name, reading.says)
        if key not in self.found and len(self.found) < _MOST_EVIDENCE:
            self.found[key] = Evidence(reading, _excerpt(text, sign.anchor), line, engine)

    @property
    def has_workers(self) -> bool:
        """Whether it came further than its arguments."""
        return any(sign not in ("arguments", "server_args", "adjusted", "dwdp") for sign, _ in self.found)


def read_log(stream: TextIO) -> Iterator[Evidence]:
    """Evidence from the last launch in a log of vLLM or SGLang, and from NCCL's lines in it.

    Args:
        stream: text, opened with ``errors="replace"``.
    """
    launch, launches, nccl = _Launch({}, 1), 0, NcclLog()
    for number, raw in _lines(stream):
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
            if sign.name == "arguments" or (sign.name == "server_args" and (launch.has_workers or not launches)):
                launch, launches, nccl = _Launch({}, number), launches + 1, NcclLog()
            launch.add(sign, reading, number, line, engine)
    if launches > 1:
        says = f"the last of {launches} launches in this log begins here; the earlier ones do not count"
        yield Evidence(Reading(says, strength=Strength.NOTE), f"(launch {launches})", launch.begins)
    yield from _in_order(launch.found.values())
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


def _in_order(found: Iterable[Evidence]) -> list[Evidence]:
    return sorted(found, key=lambda evidence: evidence.line or 0)


def _conclusions(launch: _Launch) -> Iterator[Evidence]:
    for engine, table in _TABLES:
        seen = {name: e for (name, _), e in launch.found.items() if e.engine == engine}
        if seen and (reading := table.conclude(seen)):
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
