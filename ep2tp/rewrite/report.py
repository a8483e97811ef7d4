"""What ep2tp did, as text: for an engine's log and for the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm
from typing import Any

from ep2tp.model.families import ClassName
from ep2tp.model.sharding import ShardPlan
from ep2tp.rewrite.parallel_plan import Change


def change_rows(changes: Iterable[Change]) -> list[tuple[str, str, str, str]]:
    """Rows of (setting, before, after, why)."""
    return [
        (c.setting.flags[0], _shown(c.before), "default" if c.after is None else _shown(c.after), c.why)
        for c in changes
    ]


def padding_rows(plan: ShardPlan) -> list[tuple[str, str, str, str]]:
    """Rows of (class of weights, size before, size after, memory cost and reason)."""
    rows = []
    for c in plan.facts.classes:
        split = plan.splits.get(c.name)
        if split is not None and not split.is_exact:
            block = lcm(c.padded_block, plan.multiples.get(c.name, 1))
            slices = f"{split.ranks} slices of whole {block}-blocks ({c.format_names})"
            why = f"+{split.overhead:.1%} memory: {slices if split.ranks > 1 else 'not sliced, but shares its field'}"
            rows.append((f"{c.name} ({c.field})", str(split.size), str(split.padded), why))
    for name, how in [*plan.left_to_engine.items(), *_unchecked(plan)]:
        known = plan.facts.tensor_class(name)
        if known is not None:
            rows.append((f"{name} ({known.field})", str(known.size), "unchanged", how))
    return rows


def _unchecked(plan: ShardPlan) -> list[tuple[ClassName, str]]:
    return [(name, f"NOT CHECKED: {why}; its slices might cut scale groups") for name, why in plan.unchecked.items()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, columns aligned with spaces, no line drawing: it goes into logs."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def launch_report(title: str, changes: Sequence[Change], plan: ShardPlan | None, kernel: str) -> str:
    """The block that ep2tp writes to the log once per launch."""
    rows = change_rows(changes)
    parts = [title]
    if plan is not None:
        rows += padding_rows(plan)
        parts.append(f"patch: {plan.facts.family.name} ({plan.facts.matched_by}); kernel: {kernel}")
    if rows:
        parts.append(table(("setting", "before", "after", "why"), rows))
    return "\n".join(parts)


def _shown(value: Any) -> str:
    text = "on" if value is True else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
