"""Whether two names mean one model."""

from __future__ import annotations

from pathlib import Path


def is_same_model(one: str, other: str) -> bool:
    """Whether both are the same hub id, or lead to the same folder (a trailing slash, a link)."""
    if one == other:
        return True
    first, second = Path(one), Path(other)
    return first.exists() and second.exists() and first.samefile(second)
