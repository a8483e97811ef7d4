"""Log lines as docker, journald and JSON loggers store them: each a JSON object around the engine's own line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

_FIELDS = ("log", "message", "MESSAGE")  # docker's json-file driver; JSON loggers; journalctl -o json
_PIECE = 16 << 10  # bytes of the pieces in which docker stores a longer line
_LONGEST = 1 << 20


def opened(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Numbered lines, each JSON object with a message replaced by that message; all others as they are.

    Docker's pieces of one line (SGLang's arguments are longer than one) are put together, under the first one's number.
    """
    begun: dict[bool, tuple[int, str]] = {}  # by whether it is of stderr, which docker mixes with stdout
    for number, line in lines:
        entry = _entry(line) if line.startswith("{") else {}
        text = _message(entry) if entry else None
        if text is None:
            yield number, line
            continue
        is_error = entry.get("stream") == "stderr"
        first, before = begun.pop(is_error, (number, ""))
        if _is_piece(text) and len(before) < _LONGEST:
            begun[is_error] = first, before + text
        else:
            yield first, before + text
    yield from sorted(begun.values())


def _entry(line: str) -> dict[str, Any]:
    """The JSON object that a line is; an empty one where it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _message(entry: dict[str, Any]) -> str | None:
    return next((text for name in _FIELDS if (text := _text(entry.get(name))) is not None), None)


def _text(value: Any) -> str | None:
    """A field as text; journald lists the bytes of one that is not printable, as with colours."""
    if isinstance(value, list) and value and all(type(byte) is int and 0 <= byte < 256 for byte in value):
        return bytes(value).decode(errors="replace")
    return value if isinstance(value, str) else None


def _is_piece(text: str) -> bool:
    return not text.endswith("\n") and len(text.encode(errors="replace")) >= _PIECE
