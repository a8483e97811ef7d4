"""A launch that assumes expert parallelism in, the same launch with tensor parallelism out, as a list of changes.

Knows no engine: an engine describes its settings with :class:`LaunchRules` (``engines/*/arguments.py``), and hands over
the values that differ from its defaults. The same code serves the plugins and ``ep2tp rewrite``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ep2tp.errors import LaunchError
from ep2tp.layout.split import round_up

_VOCABULARY_PADDING = 64

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One setting of an engine that is bound to expert parallelism.

    Attributes:
        field: its name in the engine's argument object.
        flags: its names on the command line; the first is the one to print.
        why: why a tensor-parallel launch does without it.
        takes_value: False for switches.
        only: values that are bound to expert parallelism; empty for any value.
        neutral: values that mean "not used".
        only_with: a field without which this setting means something else and is left alone.
    """

    field: str
    flags: tuple[str, ...]
    why: str
    takes_value: bool = True
    only: frozenset[str] = frozenset()
    neutral: frozenset[str] = frozenset()
    only_with: str = ""

    def is_bound(self, values: Values) -> bool:
        """Whether the launch sets it to something that is bound to expert parallelism."""
        value = values.get(self.field)
        if value is None or value is False or (self.only_with and not values.get(self.only_with)):
            return False
        name = str(value).lower().replace("-", "_")
        return name not in self.neutral and (not self.only or name in self.only)


@dataclass(frozen=True)
class Divided:
    """A number that an engine divides over data-parallel ranks by itself, so that folding them would multiply it.

    Attributes:
        setting: the number.
        over: settings of the ranks; the first one in use counts.
    """

    setting: Setting
    over: tuple[Setting, ...]


@dataclass(frozen=True)
class LaunchRules:
    """How one engine names its parallelism.

    Attributes:
        engine: the engine's name.
        tensor_parallel: the setting of the tensor-parallel size.
        data_parallel: the setting of a data-parallel size that multiplies it, and is folded into it (vLLM); None where
            the tensor-parallel size counts all GPUs already (SGLang).
        pipeline_parallel: the setting of the number of pipeline stages.
        triggers: settings that mean a launch assumes expert parallelism.
        resets: settings to put back to their defaults, triggers included.
        one_process_per_rank: settings by which an operator starts every data-parallel rank on its own.
        ranks_per_node: the setting of the data-parallel ranks of this node, where an operator starts nodes one by one.
        nodes: the setting of the number of nodes of one launch.
        moves: for a value of a setting, the setting that has to take its place: (field, value, setting, new value).
        divided: a number that the engine divides over data-parallel ranks, where there is one.
    """

    engine: str
    tensor_parallel: Setting
    data_parallel: Setting | None
    pipeline_parallel: Setting
    triggers: tuple[Setting, ...]
    resets: tuple[Setting, ...]
    one_process_per_rank: tuple[Setting, ...] = ()
    ranks_per_node: Setting | None = None
    nodes: Setting | None = None
    moves: tuple[tuple[str, str, Setting, str], ...] = ()
    divided: Divided | None = None

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every setting that the rules look at."""
        divided = self.divided.setting if self.divided else None
        sizes = (self.tensor_parallel, self.data_parallel, self.pipeline_parallel, self.nodes, divided)
        return (*(s for s in sizes if s is not None), *self.resets, *self.one_process_per_rank)

    def moves_apply(self, values: Values) -> bool:
        """Whether a setting has to take the place of another."""
        return any(values.get(field) == value for field, value, _, _ in self.moves)

    def gpus(self, values: Values) -> int:
        """GPUs that the tensor-parallel ranks of a rewritten launch use, of one pipeline stage."""
        tensor_parallel = size_of(self.tensor_parallel, values)
        return tensor_parallel if self.data_parallel is None else tensor_parallel * size_of(self.data_parallel, values)


@dataclass(frozen=True)
class Change:
    """One changed setting. ``after`` is None where the engine's default takes over."""

    setting: Setting
    before: Any
    after: Any
    why: str


@dataclass(frozen=True)
class Limits:
    """What of a model, apart from its MLPs, has to divide over the tensor-parallel ranks.

    Attributes:
        heads: attention heads.
        kv_heads: key-value heads, or None under multi-head latent attention. Engines replicate them over more ranks.
        vocabulary: tokens, or None where unknown. vLLM and SGLang round it up to a multiple of 64, then divide it.
    """

    heads: int
    kv_heads: int | None = None
    vocabulary: int | None = None

    def allow(self, ranks: int) -> bool:
        """Whether all of it divides over ``ranks``."""
        return not self.uneven(ranks)

    def uneven(self, ranks: int) -> str:
        """What does not divide over ``ranks``, for a message; empty where all of it does."""
        found = []
        if self.heads % ranks:
            found.append(f"{self.heads} attention heads")
        if self.kv_heads is not None and self.kv_heads % ranks and ranks % self.kv_heads:
            found.append(f"{self.kv_heads} key-value heads")
        rows = round_up(self.vocabulary or 0, _VOCABULARY_PADDING)
        if rows % ranks:
            found.append(f"{rows} vocabulary rows")
        return " and ".join(found)


def assumes_expert_parallelism(rules: LaunchRules, values: Values) -> Setting | None:
    """The setting by which a launch asks for expert parallelism, or None."""
    return next((trigger for trigger in rules.triggers if trigger.is_bound(values)), None)


def to_tensor_parallel(rules: LaunchRules, values: Values, limits: Limits | None = None) -> list[Change]:
    """The changes that make a launch tensor parallel over all its GPUs; none if it does not assume EP.

    Args:
        rules: the engine's rules.
        values: settings by field name, those that differ from the engine's defaults.
        limits: what else of the model has to divide, where known, to check the folded size.

    Raises:
        LaunchError: the launch starts one process per data-parallel rank, or the model does not divide.
    """
    trigger = assumes_expert_parallelism(rules, values)
    if trigger is None:
        return []
    _refuse_one_process_per_rank(rules, values)
    _refuse_separate_nodes(rules, values)
    changes = _fold(rules, values, limits)
    for field, value, setting, new in rules.moves:
        if values.get(field) == value:
            changes.append(Change(setting, values.get(setting.field, "default"), new, setting.why))
    for setting in rules.resets:
        if setting.is_bound(values):
            changes.append(Change(setting, values[setting.field], None, setting.why))
    return changes + _divide(rules, values)


def size_of(setting: Setting, values: Values, least: int = 1) -> int:
    """A size of a launch; 1 where it is not given.

    Raises:
        LaunchError: it is not a number from ``least`` up.
    """
    value = values.get(setting.field)
    if value is None:
        return 1
    try:
        size = int(value)
    except ValueError:
        size = least - 1
    if size < least:
        raise LaunchError(f"{setting.flags[0]} {value}: expected a number from {least} up")
    return size


def _fold(rules: LaunchRules, values: Values, limits: Limits | None) -> list[Change]:
    before, after = size_of(rules.tensor_parallel, values), rules.gpus(values)
    if limits is not None and not limits.allow(after):
        raise LaunchError(_limits_message(rules, values, limits, after))
    if rules.data_parallel is None or before == after:
        return []
    folded = after // before
    return [
        Change(rules.tensor_parallel, before, after, f"TP {before} x DP {folded} = TP {after}: same GPUs"),
        Change(rules.data_parallel, folded, None, rules.data_parallel.why),
    ]


def _divide(rules: LaunchRules, values: Values) -> list[Change]:
    over = next((s for s in rules.divided.over if s.is_bound(values)), None) if rules.divided else None
    if rules.divided is None or over is None or values.get(rules.divided.setting.field) is None:
        return []
    ranks, number = size_of(over, values), size_of(rules.divided.setting, values, least=-1)
    if ranks == 1 or number < ranks:  # -1 is "without bound"
        return []
    why = f"{rules.divided.setting.why} ({over.flags[0]} {ranks})"
    return [Change(rules.divided.setting, number, number // ranks, why)]


def _limits_message(rules: LaunchRules, values: Values, limits: Limits, ranks: int) -> str:
    fitting = [n for n in range(1, ranks + 1) if limits.allow(n)]
    best = max(n for n in fitting if ranks % n == 0)
    stages = ranks // best * size_of(rules.pipeline_parallel, values)
    tp_flag, pp_flag = rules.tensor_parallel.flags[0], rules.pipeline_parallel.flags[0]
    without = f", without {rules.data_parallel.flags[0]}" if rules.data_parallel else ""
    return (
        f"{limits.uneven(ranks)} do not divide over {ranks} tensor-parallel ranks. Sizes up to {ranks} that work: "
        f"{', '.join(map(str, fitting))}. On these GPUs: {tp_flag} {best} {pp_flag} {stages}{without}"
    )


def _refuse_one_process_per_rank(rules: LaunchRules, values: Values) -> None:
    for setting in rules.one_process_per_rank:
        if setting.is_bound(values):
            shown = f"{setting.flags[0]} {values[setting.field]}" if setting.takes_value else setting.flags[0]
            raise LaunchError(
                f"{shown}: {setting.why} Start one launch with {rules.tensor_parallel.flags[0]} {rules.gpus(values)} "
                "instead, or run this one as given with EP2TP=off"
            )


def _refuse_separate_nodes(rules: LaunchRules, values: Values) -> None:
    """Refuse a launch of which this node starts only some of the data-parallel ranks, and another node the rest."""
    if rules.ranks_per_node is None or rules.nodes is None or rules.data_parallel is None:
        return
    if values.get(rules.ranks_per_node.field) is None:
        return
    here, all_ranks = size_of(rules.ranks_per_node, values, least=0), size_of(rules.data_parallel, values)
    if here >= all_ranks or size_of(rules.nodes, values) > 1 or rules.moves_apply(values):
        return
    nodes = all_ranks // here if here else "N"
    raise LaunchError(
        f"{rules.ranks_per_node.flags[0]} {here} of {all_ranks}: other nodes start the other data-parallel ranks. "
        f"Tensor parallelism over nodes is one launch that each node joins: {rules.tensor_parallel.flags[0]} "
        f"{rules.gpus(values)} {rules.nodes.flags[0]} {nodes} --node-rank I --master-addr ADDRESS (and --headless on "
        "all nodes but the first). EP2TP=off runs this launch as given"
    )
