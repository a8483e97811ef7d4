"""What ``ep2tp patches`` and ``ep2tp rewrite`` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ep2tp.errors import Ep2tpError, NoExpertsError
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import Family
from ep2tp.model.sharding import plan_shards
from ep2tp.planner.source import load_facts
from ep2tp.rewrite.parallel_plan import Change
from ep2tp.rewrite.report import change_rows, padding_rows


def print_families(families: Mapping[str, Family]) -> None:
    """The patches in force, one below the other, so that no name is cut at 80 columns or in a pipe."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, family in families.items():
        vllm, sglang = (
            ", ".join(v) or "not checked" for v in (family.checked.get("vllm", ()), family.checked.get("sglang", ()))
        )
        matches = ", ".join((*family.match.model_types, *family.match.architectures))
        table.add_row(Text(name, "bold"), Text(family.title))
        table.add_row("  matches", Text(matches, "dim"))
        table.add_row("  checked", Text(f"vLLM {vllm}; SGLang {sglang}", "dim"))
    Console(highlight=False).print(table)


def print_model(model: str, ranks: int | None) -> None:
    """Which patch a model gets and why, how its MLPs are stored, and with ``ranks`` how they are sliced.

    Raises:
        ModelError, PatchError, CheckpointError: the model cannot be read, or no patch matches.
    """
    facts = load_facts(model)
    console = Console(markup=False, highlight=False)  # names have brackets
    console.print(f"{model}: patch {facts.family.name} ({facts.family.title}), by {facts.matched_by}")
    console.print(f"{facts.experts} experts, top {facts.top_k}")
    notes = Table.grid(padding=(0, 1, 0, 0))
    for note in (" ".join(facts.family.expert_parallel.split()), *facts.family.hazards):
        notes.add_row("-", Text(note))
    console.print(notes)
    console.print(_class_table(facts, ranks))
    if ranks is not None:
        plan = plan_shards(facts, ranks)
        if rows := padding_rows(plan):
            table = _table("padded", "before", "after", "why")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        else:
            console.print(f"{ranks} ranks: slices are whole blocks as they are, nothing to pad")


def print_changes(changes: Sequence[Change], facts: ModelFacts | None, why_no_facts: str, ranks: int) -> None:
    """The reason for each change of a command, and whether its model can do without the plugin at ``ranks``."""
    console = Console(stderr=True, markup=False, highlight=False)
    if not changes:
        console.print("The command does not ask for expert parallelism; nothing changed.")
        return
    table = _table("setting", "before", "after", "why")
    for row in change_rows(changes):
        table.add_row(*row)
    console.print(table)
    if facts is None:
        console.print(f"Whether the model divides over {ranks} ranks was not checked: {why_no_facts}")
    elif plan_shards(facts, ranks).is_padded:
        console.print(
            f"{facts.source} does not divide into whole blocks over {ranks} ranks. The plugin pads it; without the "
            f"plugin only an engine that handles this shape itself can load it (ep2tp patches --model ... --tp {ranks})"
        )


def facts_for(model: str | None) -> tuple[ModelFacts | None, str]:
    """The facts of the model that a command serves, where its config is found; else None, and why.

    Raises:
        NoExpertsError: the config is found, and names no routed experts.
    """
    if model is None:
        return None, "the model's name was not found in the command (put it right after 'serve')"
    try:
        return load_facts(model), ""
    except NoExpertsError:
        raise
    except Ep2tpError as error:
        return None, str(error)


def _class_table(facts: ModelFacts, ranks: int | None) -> Table:
    table = _table("weights", "config field", "size", "format", "block", *([f"a rank of {ranks}"] if ranks else []))
    splits = plan_shards(facts, ranks).splits if ranks else {}
    for c in facts.classes:
        block = str(c.block) if c.is_known else "?"
        share = [str(splits[c.name].per_rank)] if c.name in splits else []
        table.add_row(c.name, c.field, str(c.size), c.format_names, block, *share)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    return table
