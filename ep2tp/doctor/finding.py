"""What the doctor finds: what it is, why it matters, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum


class Level(StrEnum):
    """How much a finding stands in the way of a tensor-parallel launch."""

    OK = "ok"
    NOTE = "note"  # good to know; nothing is wrong
    UNCHECKED = "not checked"
    DEGRADED = "degraded"  # works, but slower or with less than this machine has
    BLOCKED = "blocked"  # a launch fails, hangs or computes garbage until this is changed


_EXIT_CODES = {Level.BLOCKED: 2, Level.DEGRADED: 1}


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        check: the check's name.
        level: how much it stands in the way.
        what: what was found.
        why: why that matters; empty where nothing is to be said.
        do: what to do; empty where nothing is to be done.
    """

    check: str
    level: Level
    what: str
    why: str = ""
    do: str = ""


def isolated(check: str, find: Callable[[], Iterable[Finding]], subject: str = "this check") -> Iterator[Finding]:
    """A check's findings; where it breaks off, those that it made before, and that it broke off: others go on.

    Args:
        check: its name.
        find: the check.
        subject: what broke off, in words.
    """
    try:
        yield from find()
    except Exception as error:  # whatever it is, the other checks' findings are worth having
        do = "where the reason is not this machine's, please report it to ep2tp"
        yield Finding(check, Level.UNCHECKED, f"{subject} broke off: {in_words(error)}", "", do)


def in_words(error: Exception) -> str:
    """An error's kind and message."""
    return f"{type(error).__name__}: {error}"


def of_each(findings: Iterable[tuple[str, Finding]], what: str, count: int) -> Iterator[Finding]:
    """Findings on several subjects, those that say the same put together.

    Args:
        findings: with the subject's name, in the order of the subjects.
        what: the subjects' word, ``GPU`` for ``GPUs 0, 1: ...``.
        count: how many subjects there are, to say ``all GPUs``.
    """
    together: dict[Finding, list[str]] = {}
    for subject, finding in findings:
        together.setdefault(finding, []).append(subject)
    for finding, subjects in together.items():
        several = "" if len(subjects) == 1 else "s"
        where = f"all {what}s" if len(subjects) == count > 1 else f"{what}{several} {', '.join(subjects)}"
        yield replace(finding, what=f"{where}: {finding.what}")


def exit_code(findings: Iterable[Finding]) -> int:
    """0 ready, 1 degraded, 2 blocked; what could not be checked changes nothing."""
    return max((_EXIT_CODES.get(finding.level, 0) for finding in findings), default=0)


def verdict(findings: Iterable[Finding]) -> str:
    """``ready``, ``degraded`` or ``blocked``."""
    return ("ready", "degraded", "blocked")[exit_code(findings)]
