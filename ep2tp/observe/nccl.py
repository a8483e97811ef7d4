"""NCCL's own log (``NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=COLL``): collectives by kind and size, and per step.

NCCL prints a line for every call that a program makes. It does not see all_reduce kernels of the engines' own, and with
CUDA graphs it sees the capture only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ep2tp.observe.evidence import DEP, Evidence, Reading, Strength
from ep2tp.observe.tally import Tally, in_words, plans_of

_CALL = re.compile(
    r"(?P<rank>\S+:\d+):\d+ \[(?P<device>\d+)\] (?:\S+ )?NCCL INFO (?P<kind>\w+): opCount (?P<op>\w+) .*?"
    r"count (?P<count>\d+) datatype (?P<type>\d+) .*?root (?P<peer>\d+) comm (?P<comm>\w+) \[nranks=(?P<ranks>\d+)\]"
)
_KINDS = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AlltoAll": "all_to_all",
    "AllToAll": "all_to_all",
    "Broadcast": "broadcast",
    "Bcast": "broadcast",
    "Reduce": "reduce",
    "Gather": "gather",
    "Scatter": "scatter",
}
# ncclDataType_t in nccl.h: (u)int8, (u)int32, (u)int64, float16, float32, float64, bfloat16, float8 e4m3 and e5m2.
_BYTES = (1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1)


@dataclass
class _Exchange:
    """A run of sends and receives of one rank on one communicator: an all_to_all, or a pipeline's transfer."""

    comm: str
    ranks: int
    size: int = 0
    sent_to: set[int] = field(default_factory=set)
    received_from: set[int] = field(default_factory=set)

    def add(self, match: re.Match[str], size: int) -> bool:
        """Add a call; False where it begins another exchange."""
        peers = self.sent_to if match["kind"] == "Send" else self.received_from
        if match["comm"] != self.comm or int(match["peer"]) in peers:
            return False
        peers.add(int(match["peer"]))
        self.size += size if match["kind"] == "Send" else 0
        return True

    @property
    def is_all_to_all(self) -> bool:
        """Whether it exchanged with every other; of two, with itself as well, since two of a pipeline exchange, too."""
        both = self.sent_to & self.received_from
        return len(both) == self.ranks or (self.ranks > 2 and len(both) == self.ranks - 1)


class NcclLog:
    """Takes NCCL's lines one by one. Counts the first rank that it sees; the others do the same."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._rank = ""
        self._exchange: _Exchange | None = None
        self._first: dict[str, tuple[int, str]] = {}
        self._other_line: int | None = None

    def feed(self, number: int, line: str) -> None:
        """Read line ``number``; lines of other subsystems are skipped."""
        match = _CALL.search(line)
        if match is None:
            self._other_line = self._other_line or number
            return
        rank = f"{match['rank']} {match['device']}"
        self._rank = self._rank or rank
        if rank != self._rank or int(match["ranks"]) < 2:
            return
        width = _BYTES[int(match["type"])] if int(match["type"]) < len(_BYTES) else 1
        size = int(match["count"]) * width
        if match["kind"] in ("Send", "Recv"):
            self._exchanged(number, line, match, size)
            return
        self._end_exchange()
        if kind := _KINDS.get(match["kind"]):
            self._add(kind, size, number, line)

    def _exchanged(self, number: int, line: str, match: re.Match[str], size: int) -> None:
        if self._exchange is None or not self._exchange.add(match, size):
            self._end_exchange()
            self._exchange = _Exchange(match["comm"], int(match["ranks"]))
            self._exchange.add(match, size)
        self._first.setdefault("send_recv", (number, line))

    def _end_exchange(self) -> None:
        if self._exchange is not None:
            kind = "all_to_all" if self._exchange.is_all_to_all else "send_recv"
            self._tally.add(kind, self._exchange.size)
            self._exchange = None

    def _add(self, kind: str, size: int, number: int, line: str) -> None:
        self._tally.add(kind, size)
        self._first.setdefault(kind, (number, line))

    def evidence(self) -> Iterator[Evidence]:
        """What the lines said, once all are read."""
        self._end_exchange()
        if not self._tally.kinds:
            if self._other_line is not None:
                says = "NCCL logs, but no collectives: start with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=COLL to see them"
                yield Evidence(Reading(says, strength=Strength.NOTE), "NCCL INFO", self._other_line)
            return
        for reading in plans_of(self._tally.kinds):
            number, line = self._line_of(reading)
            yield Evidence(reading, _excerpt(line), number)
        counted = f"rank {self._rank}: {self._tally.common()}"
        yield Evidence(
            Reading("collectives by kind and bytes, the most frequent ones", strength=Strength.NOTE), counted
        )
        if step := self._tally.step():
            says = "one step, which the end of the log repeats (of the calls that NCCL sees)"
            yield Evidence(Reading(says, strength=Strength.NOTE), in_words(step))

    def _line_of(self, reading: Reading) -> tuple[int, str]:
        if reading.plans <= DEP and "send_recv" in self._first:
            return self._first["send_recv"]
        for kind in ("reduce_scatter", "reduce", "all_to_all", "all_reduce"):
            if kind in self._first:
                return self._first[kind]
        return next(iter(self._first.values()))


def _excerpt(line: str) -> str:
    start = line.find("NCCL INFO")
    return line[max(start, 0) :].strip()[:160]
