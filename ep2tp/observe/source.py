"""Which kind of source a word on the command line names, and the reader for it."""

from __future__ import annotations

import io
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

from ep2tp.errors import SourceError
from ep2tp.observe.evidence import Evidence, Reading, Strength
from ep2tp.observe.gunzip import Gunzip

_PEEK = 1 << 16
_TRACE = re.compile(
    rb'^\s*(?:\{.*"(?:traceEvents|schemaVersion|deviceProperties|baseTimeNanoseconds)"|\[\s*\{.*"ph")', re.DOTALL
)


def read_source(source: str) -> Iterator[Evidence]:
    """Evidence from a log or trace (a path, or ``-`` for standard input; gzip too), a server's URL, or a process id.

    Raises:
        SourceError: it cannot be read, or is none of these.
    """
    if source.startswith(("http://", "https://")):
        from ep2tp.observe.server import read_server

        return read_server(source)
    if source.isdecimal() and not Path(source).exists():
        from ep2tp.observe.process import read_process

        return read_process(int(source))
    return _read_stream(source)


def _read_stream(source: str) -> Iterator[Evidence]:
    with ExitStack() as stack:
        try:
            raw = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
            stream, packed = _unpacked(cast("io.BufferedReader", raw))
            is_trace = bool(_TRACE.match(stream.peek(_PEEK)[:_PEEK]))
            yield from _read(stream, is_trace, source)
            if packed is not None and packed.is_cut:
                says = "the compressed file is cut off; what comes before the cut was read"
                yield Evidence(Reading(says, strength=Strength.NOTE), "(end of the file)")
        except (OSError, zlib.error) as error:
            raise SourceError(
                f"{source}: cannot be read ({error.args[-1]}); name a log, a trace, a URL or a pid"
            ) from error


def _read(stream: io.BufferedReader, is_trace: bool, source: str) -> Iterator[Evidence]:
    if is_trace:
        from ep2tp.observe.trace import read_trace

        yield from read_trace(cast("IO[bytes]", stream), source)
        return
    from ep2tp.observe.boot_log import read_log

    yield from read_log(io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n"))


def _unpacked(raw: io.BufferedReader) -> tuple[io.BufferedReader, Gunzip | None]:
    """A stream of what ``raw`` holds, and what unpacks it where it is gzip."""
    if raw.peek(2)[:2] == b"\x1f\x8b":
        packed = Gunzip(raw)
        return io.BufferedReader(packed, _PEEK), packed
    return (raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, _PEEK)), None
