"""Where a command line starts an engine: whose arguments follow, and which words before are another program's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePath

from ep2tp.engines.sglang.arguments import RULES as SGLANG
from ep2tp.engines.vllm.arguments import RULES as VLLM
from ep2tp.errors import LaunchError
from ep2tp.rewrite.parallel_plan import LaunchRules

_RULES = {"vllm": VLLM, "sglang": SGLANG}
# A name alone may be a container's or an environment's; with one of these after it, it is the executable.
_COMMANDS = {"vllm": ("serve", "bench", "run-batch", "launch"), "sglang": ("serve",)}
# vllm/vllm-openai:TAG, of any registry: its entry point is the server. Neither a container's name nor a path.
_VLLM_IMAGE = re.compile(r"(?:[\w.-]+(?::\d+)?/)+vllm-openai[\w.-]*(?:[:@][\w.:-]+)?")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.+)", re.DOTALL)
_SHELL_SYNTAX = re.compile(r"[$`;&|<>\n]")


def command_words(words: Sequence[str]) -> list[str]:
    """The words of a command, which may be given as one quoted word: ``"vllm serve MODEL ..."``.

    Raises:
        LaunchError: only a shell can split that one word.
    """
    if len(words) != 1:
        return list(words)
    text = words[0].replace("\\\n", " ").strip()
    if found := _SHELL_SYNTAX.search(text):
        raise LaunchError(
            f"{text}: {found[0]!r} in a quoted command is for a shell to read; give one command, without quotes around "
            "it"
        )
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"{text}: {error}; give the command without quotes around it") from None


def split_at_engine(words: Sequence[str]) -> tuple[LaunchRules, int]:
    """The rules of the engine that a command starts, and the position of the engine's first argument.

    ``vllm serve`` (or a path to it), ``sglang serve`` and ``-m MODULE`` are found behind any other program's words
    (``env``, ``srun``, ``docker run``); without one of them, vLLM's own image stands for its server.

    Raises:
        LaunchError: the command starts neither vLLM nor SGLang, or does so inside a quoted word (``bash -c "..."``).
    """
    if (start := _executable(words)) is not None:
        return start
    if (quoted := next((word for word in words if _holds_launch(word)), None)) is not None:
        raise LaunchError(f"{quoted}: the launch is inside this quoted word; give it alone, and unquoted")
    for position, word in enumerate(words):
        if is_vllm_image(word):
            return VLLM, position + 1
    raise LaunchError(
        f"{' '.join(words) or '(empty command)'}: starts neither vLLM nor SGLang; expected 'vllm serve MODEL ...', "
        "'python -m sglang.launch_server ...' or 'sglang serve ...'"
    )


def is_vllm_image(word: str) -> bool:
    """Whether a word names an image whose entry point is vLLM's server."""
    return _VLLM_IMAGE.fullmatch(word) is not None


def shell_line(words: Sequence[str]) -> str:
    """A command as a shell reads it: as ``shlex.join``, but what is assigned before the engine stays an assignment.

    Raises:
        LaunchError: it starts neither engine.
    """
    _, first = split_at_engine(words)
    return " ".join([*map(_quoted, words[:first]), *map(shlex.quote, words[first:])])


def _executable(words: Sequence[str]) -> tuple[LaunchRules, int] | None:
    for position, (word, after) in enumerate(pairwise(words)):
        name = PurePath(word).name
        if after in _COMMANDS.get(name, ()):
            return _RULES[name], position + 1
        if word == "-m" and (module := after.partition(".")[0]) in _RULES:
            return _RULES[module], position + 2
    return None


def _holds_launch(word: str) -> bool:
    """Whether a word is itself a command that starts an engine, at once or in a quoted word of its own."""
    try:
        inner = shlex.split(word)
    except ValueError:
        return False
    return len(inner) > 1 and (
        _executable(inner) is not None or any(is_vllm_image(w) or _holds_launch(w) for w in inner)
    )


def _quoted(word: str) -> str:
    """A shell takes ``'NAME=a b'``, quoted whole, for the name of a program."""
    assigned = _ASSIGNMENT.fullmatch(word)
    return f"{assigned[1]}={shlex.quote(assigned[2])}" if assigned else shlex.quote(word)
