"""The settings in a vLLM command that are JSON of their own: those of a speculative draft, and of the kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ep2tp.engines.vllm.arguments import changed_draft, draft_changes
from ep2tp.errors import LaunchError
from ep2tp.rewrite.parallel_plan import Change

_DRAFT = ("--speculative-config", "-sc")
_KERNELS = ("--kernel-config",)
JSON_FLAGS = (*_DRAFT, *_KERNELS)
_BACKEND = "moe_backend"


class Edit(NamedTuple):
    """What takes the place of words[start:stop]."""

    start: int
    stop: int
    words: list[str]


@dataclass(frozen=True)
class _JsonUse:
    """One use of such a setting: words[start:stop], with the flag as given and, after its dot, the key."""

    start: int
    stop: int
    flag: str
    values: dict[str, Any]

    @property
    def name(self) -> str:
        return self.flag.partition(".")[0].replace("_", "-")

    def edit(self, values: dict[str, Any]) -> Edit:
        key = self.flag.partition(".")[2]
        words = [self.flag, str(values[key]) if key else json.dumps(values)] if values else []
        return Edit(self.start, self.stop, words)


def with_kernel_backend(values: Mapping[str, Any], words: Sequence[str], first: int) -> dict[str, Any]:
    """The values with the MoE backend of ``--kernel-config``, which vLLM uses where ``--moe-backend`` gives none.

    Raises:
        LaunchError: the command ends where the value of a JSON setting should be.
    """
    found = dict(values)
    for use in _json_uses(words, first):
        backend = use.values.get(_BACKEND)
        if use.name in _KERNELS and backend is not None and found.get(_BACKEND, "auto") == "auto":
            found[_BACKEND] = backend
    return found


def json_edits(words: Sequence[str], first: int, changes: Sequence[Change]) -> tuple[list[Edit], list[Change]]:
    """How the JSON settings follow ``changes``, and what was changed of a draft for that.

    Args:
        words: the command.
        first: position of the engine's first argument.
        changes: what makes the launch tensor parallel.
    """
    resets_backend = any(change.setting.field == _BACKEND for change in changes)
    edits, found = [], []
    for use in _json_uses(words, first):
        after = use.values
        if use.name in _DRAFT:
            of_draft = draft_changes(use.values, list(changes))
            after = changed_draft(use.values, of_draft)
            found += of_draft
        elif resets_backend:
            after = {key: value for key, value in use.values.items() if key != _BACKEND}
        if after != use.values:
            edits.append(use.edit(after))
    return edits, found


def _json_uses(words: Sequence[str], first: int) -> Iterator[_JsonUse]:
    for start, word in enumerate(words[first:], first):
        flag, has_value, text = word.partition("=")
        name, _, key = flag.partition(".")
        if name.replace("_", "-") not in JSON_FLAGS:
            continue
        if not has_value:
            if start + 1 == len(words):
                raise LaunchError(f"{word}: the command ends where its value should be")
            text = words[start + 1]
        values = _parsed(text, key)
        if isinstance(values, dict):
            yield _JsonUse(start, start + (1 if has_value else 2), flag, values)


def _parsed(text: str, key: str) -> Any:
    """The settings that one flag gives: all of them as JSON, or one under its key. None where it is no JSON."""
    if key:
        return {key: int(text) if text.isdecimal() else text}
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
