"""What the process that starts a launch tells its workers: pickled with ``ServerArgs``, which each of them gets."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

_SEED = secrets.token_hex(8)  # process ids repeat from container to container
_SEEN = "_ep2tp_seen"
_ATTRIBUTE = "_ep2tp"  # ServerArgs keeps what begins with an underscore and is no field of its own


class LaunchNote(dict[str, Any]):
    """Whether a launch was rewritten, and how its weights are padded. Being unpickled, it wraps the worker's seams.

    SGLang logs the errors of a plugin and runs on, and ``SGLANG_PLUGINS`` may leave one out. A worker that finds no
    ep2tp cannot unpickle the note and stops there, instead of running half of a rewritten launch.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the name of :func:`_restore`."""
        return _restore, (dict(self),)


def _restore(values: Mapping[str, Any]) -> LaunchNote:
    from ep2tp.engines.sglang import worker

    note = LaunchNote(values)
    if note["launcher"] != this_process():  # a copy that the launching process makes for itself joins nothing
        worker.join(note)
    return note


def this_process() -> str:
    """A name that no other process has, nor a fork of this one."""
    return f"{os.getpid()}-{_SEED}"


def attach(arguments: Any, note: LaunchNote) -> None:
    """Put a note on a ``ServerArgs``."""
    arguments.__dict__[_ATTRIBUTE] = note


def mark_seen(arguments: Any) -> None:
    """Tell the workers that ep2tp looked at this launch. Unlike a note, it needs no ep2tp to be unpickled."""
    arguments.__dict__[_SEEN] = True


def was_seen(arguments: Any) -> bool:
    """Whether ep2tp looked at this launch before it was resolved."""
    return bool(arguments.__dict__.get(_SEEN))


def find(arguments: Any) -> LaunchNote | None:
    """The note on a ``ServerArgs``, or None."""
    note = arguments.__dict__.get(_ATTRIBUTE)
    return note if isinstance(note, LaunchNote) else None
