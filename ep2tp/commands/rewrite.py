"""``ep2tp rewrite``: a command line that assumes expert parallelism in, its tensor-parallel equivalent out.

Uses the rules of the plugins, but reads flags as text: neither engine has to be installed, and nothing is started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep2tp.commands.engine_words import is_vllm_image, split_at_engine
from ep2tp.commands.json_settings import JSON_FLAGS, Edit, json_edits, with_kernel_backend
from ep2tp.engines.sglang.arguments import RULES as SGLANG
from ep2tp.engines.sglang.arguments import without_harmless_prefill_cp
from ep2tp.engines.vllm.arguments import PROCESS_PER_RANK, encoder_changes, process_per_rank
from ep2tp.engines.vllm.arguments import RULES as VLLM
from ep2tp.errors import LaunchError
from ep2tp.rewrite.parallel_plan import (
    Change,
    LaunchRules,
    Limits,
    Setting,
    assumes_expert_parallelism,
    to_tensor_parallel,
)

_MODEL_FLAGS = ("--model", "--model-path")
# Options of the engines themselves that a flag of the rules happens to begin with ("vllm bench throughput --n 2").
_WHOLE_FLAGS = frozenset({"--n"})
# As a shell and env take it, or docker run's --env.
_PROCESS_PER_RANK = re.compile(rf"(?:--env=|-e)?({PROCESS_PER_RANK}=0*(?:[2-9]|[1-9]\d+))")


@dataclass(frozen=True)
class RewrittenCommand:
    """A command line after the rewrite.

    Attributes:
        engine: ``vllm`` or ``sglang``.
        words: the command.
        changes: what was changed and why; empty where it does not assume expert parallelism.
        gpus: GPUs of one pipeline stage.
    """

    engine: str
    words: list[str]
    changes: list[Change]
    gpus: int


@dataclass(frozen=True)
class _Use:
    """One use of a setting: words[start:stop], with its value (True for a switch)."""

    setting: Setting
    value: str | bool
    start: int
    stop: int


def rewrite_command(
    words: Sequence[str], limits: Limits | None = None, config: Mapping[str, Any] | None = None
) -> RewrittenCommand:
    """Rewrite a command line.

    Args:
        words: the command, split as a shell splits it; words before the engine (``env``, ``docker run``) are kept.
        limits: what of the model has to divide, where known.
        config: the model's config.json, where known.

    Raises:
        LaunchError: it starts neither engine, takes settings from a file, or cannot become tensor parallel.
    """
    rules, first = split_at_engine(words)
    if any(word.partition("=")[0] == "--config" for word in words[first:]):
        raise LaunchError("--config: settings in a file are not read here; put them on the command line")
    uses = _uses(words, rules, first)
    values: Mapping[str, Any] = {use.setting.field: use.value for use in uses}
    if rules is SGLANG:
        values = without_harmless_prefill_cp(values, config)
    else:
        values = with_kernel_backend(values, words, first)
        if assumes_expert_parallelism(rules, values):
            _refuse_process_per_rank(words[:first])
    changes = to_tensor_parallel(rules, values, limits)
    changed = {change.setting.field for change in changes}
    edits = [Edit(use.start, use.stop, []) for use in uses if use.setting.field in changed]
    given = [
        word for change in changes if change.after is not None for word in (change.setting.flags[0], str(change.after))
    ]
    if rules is VLLM and changes:
        of_encoder = encoder_changes(_encoder_mode(words[first:]), config, rules.gpus(values))
        given += [word for change in of_encoder for word in (change.setting.flags[0], str(change.after))]
        of_json, of_draft = json_edits(words, first, changes)
        edits += of_json
        changes = [*changes, *of_encoder, *of_draft]
    kept = list(words)
    for start, stop, instead in sorted(edits, reverse=True):
        kept[start:stop] = instead
    return RewrittenCommand(rules.engine, kept + given, changes, rules.gpus(values))


def _encoder_mode(arguments: Sequence[str]) -> str | None:
    """The image encoder's mode: vLLM's default, or None where the command chooses one."""
    return None if any(_flag_of(word) == "--mm-encoder-tp-mode" for word in arguments) else "weights"


def model_of(words: Sequence[str]) -> str | None:
    """The model that a command serves, as it names it; None where it is not certain which word that is.

    Raises:
        LaunchError: it starts neither engine, or has a flag that is not written in full or has no value.
    """
    rules, first = split_at_engine(words)
    for position, word in enumerate(words[first:], first):
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") in _MODEL_FLAGS:
            return value or next(iter(words[position + 1 :]), None)
    # Other flags may or may not take the word after them.
    starts = [use.stop for use in _uses(words, rules, first)]
    if "serve" in words[first : first + 1]:
        starts.insert(0, first + 1)
    elif is_vllm_image(words[first - 1]):
        starts.insert(0, first)
    return next((words[s] for s in starts if s < len(words) and not words[s].startswith("-")), None)


def full_flags(word: str, rules: LaunchRules) -> list[str]:
    """The flags of the rules that an engine's ``argparse`` may take a word for, as it takes ``--enable-exp``.

    Empty where the word is written in full, or is another flag.
    """
    flag = _flag_of(word)
    switches = ["--no-" + f[2:] for s in rules.settings if not s.takes_value for f in s.flags if f.startswith("--")]
    flags = [*(f for s in rules.settings for f in s.flags), *switches, *(JSON_FLAGS if rules is VLLM else ())]
    if flag in flags or flag in _WHOLE_FLAGS or not flag.startswith("-") or not flag.strip("-"):
        return []
    return [full for full in flags if full.startswith(flag)]


def _uses(words: Sequence[str], rules: LaunchRules, first: int) -> list[_Use]:
    by_flag = {flag: setting for setting in rules.settings for flag in setting.flags}
    uses = []
    for start, word in enumerate(words[first:], first):
        if full := full_flags(word, rules):
            raise LaunchError(f"{word}: write the flag in full: {' or '.join(full)}")
        _, has_value, value = word.partition("=")
        flag = _flag_of(word)
        setting = by_flag.get(flag)
        if setting is None and flag.startswith("--no-") and "--" + flag[5:] in by_flag:
            uses.append(_Use(by_flag["--" + flag[5:]], False, start, start + 1))
        elif setting is not None and (has_value or not setting.takes_value):
            uses.append(_Use(setting, value if setting.takes_value else value or True, start, start + 1))
        elif setting is not None:
            if start + 1 == len(words):
                raise LaunchError(f"{word}: the command ends where its value should be")
            uses.append(_Use(setting, words[start + 1], start, start + 2))
    return uses


def _flag_of(word: str) -> str:
    """The flag of a word, as the engine names it: vLLM takes keys as --eplb-config.KEY, and underscores."""
    flag = word.partition("=")[0].partition(".")[0]
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _refuse_process_per_rank(before_engine: Sequence[str]) -> None:
    """Refuse what the plugin refuses in the environment of a launch."""
    for word in before_engine:
        if found := _PROCESS_PER_RANK.fullmatch(word):
            raise process_per_rank(found[1])
