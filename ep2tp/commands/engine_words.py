"""Where a command line starts an engine: whose arguments follow, and which words before are another program's."""

from __future__ import annotations

import re
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


def split_at_engine(words: Sequence[str]) -> tuple[LaunchRules, int]:
    """The rules of the engine that a command starts, and the position of the engine's first argument.

    ``vllm serve`` (or a path to it), ``sglang serve`` and ``-m MODULE`` are found behind any other program's words
    (``env``, ``srun``, ``docker run``); without one of them, vLLM's own image stands for its server.

    Raises:
        LaunchError: the command starts neither vLLM nor SGLang.
    """
    for position, (word, after) in enumerate(pairwise(words)):
        name = PurePath(word).name
        if after in _COMMANDS.get(name, ()):
            return _RULES[name], position + 1
        if word == "-m" and (module := after.partition(".")[0]) in _RULES:
            return _RULES[module], position + 2
    for position, word in enumerate(words):
        if _VLLM_IMAGE.fullmatch(word):
            return VLLM, position + 1
    raise LaunchError(
        f"{' '.join(words) or '(empty command)'}: starts neither vLLM nor SGLang; expected 'vllm serve MODEL ...', "
        "'python -m sglang.launch_server ...' or 'sglang serve ...'"
    )
