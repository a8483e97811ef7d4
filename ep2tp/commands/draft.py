"""The settings of a speculative draft in a vLLM command, which are JSON of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ep2tp.engines.vllm.arguments import changed_draft, draft_changes
from ep2tp.rewrite.parallel_plan import Change

_FLAGS = ("--speculative-config", "-sc")


def fold_draft(words: Sequence[str], first: int, changes: list[Change]) -> tuple[list[str], list[Change]]:
    """A command whose draft follows ``changes``, and what was changed for that.

    Args:
        words: the command, without what ``changes`` take out.
        first: position of the engine's first argument.
        changes: what makes the launch tensor parallel.
    """
    folded, found = list(words[:first]), []
    rest = iter(words[first:])
    for word in rest:
        flag, has_value, value = word.partition("=")
        name, _, key = flag.partition(".")
        if name.replace("_", "-") not in _FLAGS:
            folded.append(word)
            continue
        text = value if has_value else next(rest, "")
        before = _parsed(text, key)
        of_draft = draft_changes(before, changes)
        after = changed_draft(before, of_draft) if of_draft else None
        found += of_draft
        if after is None:
            folded += [word] if has_value else [word, text]
        elif after:
            folded += [flag, str(after[key]) if key else json.dumps(after)]
    return folded, found


def _parsed(text: str, key: str) -> Any:
    """The settings that one flag gives: all of them as JSON, or one under its key. None where it is no JSON."""
    if key:
        return {key: int(text) if text.isdecimal() else text}
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
