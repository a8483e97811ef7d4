"""A sign: a line of a log that tells something about the plan. Engines' tables of signs are beside this file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ep2tp.observe.evidence import Reading

# Where a message begins: the line's start, after the bracketed parts of loggers' prefixes (with no quote before it), or
# as a field of a JSON log. Elsewhere the same words are somebody's prompt, or code in a traceback.
MESSAGE = r"(?:^(?:[^\[\]'\"]*\[[^\[\]'\"]*\][: ]+){0,3}|\"(?:message|msg)\": ?\")"


@dataclass(frozen=True)
class Sign:
    """One kind of line.

    Attributes:
        name: its name, unique in its table.
        anchor: characters that such a line contains; tested before the pattern, since logs run to gigabytes.
        pattern: what the line looks like, without colours.
        read: what a match says, or None where it says nothing.
        is_last_valid: a later line of this kind replaces an earlier one, instead of adding to it.
        origin: where an engine has the words: (file or folder below its package, words); tests look them up there.
    """

    name: str
    anchor: str
    pattern: re.Pattern[str]
    read: Callable[[re.Match[str]], Reading | None]
    is_last_valid: bool = False
    origin: tuple[str, str] | None = None


def message(pattern: str) -> re.Pattern[str]:
    """A pattern for the beginning of a log message."""
    return re.compile(MESSAGE + pattern)


def always(reading: Reading) -> Callable[[re.Match[str]], Reading]:
    """The same reading for every match."""
    return lambda _: reading


def tags(text: str) -> dict[str, int]:
    """Ranks from a process name or log prefix: ``_TP0_EP1`` and `` TP0 EP1`` are ``{"TP": 0, "EP": 1}``."""
    return {name: int(rank) for name, rank in re.findall(r"(?<![A-Z])([A-Z]+(?:_[A-Z]+)*)(\d{1,9})", text)}
