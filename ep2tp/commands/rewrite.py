"""``ep2tp rewrite``: a command line that assumes expert parallelism in, its tensor-parallel equivalent out.

Uses the rules of the plugins, but reads flags as text: neither engine has to be installed, and nothing is started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep2tp.commands.draft import fold_draft
from ep2tp.commands.engine_words import split_at_engine
from ep2tp.engines.sglang.arguments import RULES as SGLANG
from ep2tp.engines.sglang.arguments import without_harmless_prefill_cp
from ep2tp.engines.vllm.arguments import RULES as VLLM
from ep2tp.errors import LaunchError
from ep2tp.rewrite.parallel_plan import Change, LaunchRules, Limits, Setting, to_tensor_parallel

_MODEL_FLAGS = ("--model", "--model-path")


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
    changes = to_tensor_parallel(rules, values, limits)
    after = {change.setting.field: change.after for change in changes}
    kept: list[str] = []
    position = 0
    for use in uses:
        kept += words[position : use.start]
        if use.setting.field not in after:
            kept += words[use.start : use.stop]
        position = use.stop
    kept += words[position:]
    for change in changes:
        if change.after is not None:
            kept += [change.setting.flags[0], str(change.after)]
    if rules is VLLM and changes:
        kept, of_draft = fold_draft(kept, first, changes)
        changes = [*changes, *of_draft]
    return RewrittenCommand(rules.engine, kept, changes, rules.gpus(values))


def model_of(words: Sequence[str]) -> str | None:
    """The model that a command serves, as it names it.

    Raises:
        LaunchError: it starts neither engine.
    """
    _, first = split_at_engine(words)
    arguments = list(words[first:])
    for position, word in enumerate(arguments):
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") in _MODEL_FLAGS:
            return value or next(iter(arguments[position + 1 :]), None)
    after_serve = arguments[arguments.index("serve") + 1 :] if "serve" in arguments else []
    return next((word for word in after_serve[:1] if not word.startswith("-")), None)


def _uses(words: Sequence[str], rules: LaunchRules, first: int) -> list[_Use]:
    by_flag = {flag: setting for setting in rules.settings for flag in setting.flags}
    uses = []
    for start, word in enumerate(words[first:], first):
        flag, has_value, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        # vLLM takes keys of a JSON setting as --eplb-config.num_redundant_experts 32, and --no-X for switches.
        setting = by_flag.get(flag.partition(".")[0])
        if setting is None and flag.startswith("--no-") and "--" + flag[5:] in by_flag:
            uses.append(_Use(by_flag["--" + flag[5:]], False, start, start + 1))
        elif setting is not None and (has_value or not setting.takes_value):
            uses.append(_Use(setting, value if setting.takes_value else value or True, start, start + 1))
        elif setting is not None:
            if start + 1 == len(words):
                raise LaunchError(f"{word}: the command ends where its value should be")
            uses.append(_Use(setting, words[start + 1], start, start + 2))
    return uses
