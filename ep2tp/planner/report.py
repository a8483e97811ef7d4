"""The comparison as tables for a terminal, from 80 columns up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ep2tp.planner.advise import Verdict
from ep2tp.planner.communication import sent_bytes
from ep2tp.planner.compare import Assessment, Question
from ep2tp.planner.memory import GB, usable_bytes


def print_report(console: Console, question: Question, assessed: Sequence[Assessment], verdict: Verdict) -> None:
    """Everything, the verdict last, where the eye is when the command ends."""
    _print_header(console, question)
    rows = [row for a in assessed for row in ((a.in_vllm, a) if a.in_vllm else (a,))]
    fastest = [verdict.by_batch]
    if len(rows) > len(assessed):
        fastest.append(verdict.by_batch_in_vllm)
        console.print("plans named vLLM: 0.32 and later; those named SGLang: vLLM before 0.32, too")
    for table in _fitting(console, question.batches, lambda some: _time_table(question, rows, fastest, some)):
        console.print(table)
    if not all(a.holds(batch) for a in rows if a.runs for batch in question.batches):
        console.print("! more sequences of this context than the KV cache holds at once\n")
    console.print(_memory_table(question, rows))
    for table in _fitting(console, question.batches, lambda some: _communication_table(assessed, some)):
        console.print(table)
    _print_divisibility(console, assessed, verdict)
    _print_verdict(console, verdict)


def _print_header(console: Console, question: Question) -> None:
    facts, inventory, gpu = question.facts, question.inventory, question.gpu
    formats = ", ".join(dict.fromkeys(c.format_names for c in facts.classes))
    estimate = ", attention estimated" if inventory.attention.is_estimate and inventory.source == "config.json" else ""
    console.print(
        f"[bold]{escape(facts.source)}[/]: {facts.experts} experts, top {facts.top_k}, hidden {facts.hidden}, "
        f"{formats}; {inventory.total(facts) / GB:.1f} GB of weights ({inventory.source}{estimate})"
        + (f", MTP {inventory.mtp / GB:.1f} GB more" if inventory.mtp else "")
    )
    console.print(
        f"{question.gpus} x {gpu.name}: {gpu.memory_gb:.0f} GB, {usable_bytes(gpu.memory_gb) / GB:.1f} usable; "
        f"{gpu.bandwidth / 1e12:.2f} TB/s ({gpu.source})"
    )
    console.print(f"link {question.link.name} ({question.link.label})")


def _fitting(
    console: Console, batches: tuple[int, ...], table_of: Callable[[tuple[int, ...]], Table]
) -> Iterator[Table]:
    """As many tables as it takes for the console to have room for all batches; no figure is cut off."""
    any_width = console.options.update(width=10_000)
    while batches:
        for count in range(len(batches), 0, -1):
            table = table_of(batches[:count])
            if console.measure(table, options=any_width).minimum <= console.width:
                break
        yield table
        batches = batches[count:]


def _time_table(
    question: Question,
    assessed: Sequence[Assessment],
    fastest: Sequence[dict[int, Assessment | None]],
    batches: tuple[int, ...],
) -> Table:
    table = _table(f"Decode, ms a token (computed bound; context {question.context})")
    table.add_column("plan", no_wrap=True, min_width=10)
    for batch in batches:
        _add_figures(table, f"batch {batch}")
    _add_figures(table, "tok/s")
    _add_figures(table, f"prefill {question.prompt}")
    table.add_column("runs", overflow="fold")
    last = batches[-1]
    for a in assessed:
        cells: list[str | Text] = []
        for batch in batches:
            is_best = any(found.get(batch) is a for found in fastest)
            mark = "" if a.holds(batch) or not a.runs else "!"
            cells.append(Text(mark + _ms(a.decode[batch].total), style="bold green" if is_best else ""))
        row: list[str | Text] = [
            a.name,
            *cells,
            ("" if a.holds(last) or not a.runs else "!") + f"{1e3 * last / a.decode[last].total:.0f}",
            _ms(a.prefill.total),
            _runs(a),
        ]
        table.add_row(*row, style="" if a.runs else "dim")
    return table


def _memory_table(question: Question, assessed: Sequence[Assessment]) -> Table:
    table = _table("Memory, GB a GPU (computed)", gap=0)
    for column in ("plan", "weights", "routed", "shared", "dense", "attn", "embed", "other", "pad", "KV/seq", "seqs"):
        table.add_column(column, justify="left" if column == "plan" else "right", no_wrap=True)
    for a in assessed:
        w = a.weights
        parts = (w.total, w.routed, w.shared, w.dense, w.attention, w.embeddings, w.other + w.encoder, w.padding)
        cells = [_gb(part) for part in parts]
        table.add_row(a.name, *cells, f"{a.cache / GB:.2f}", str(max(0, a.sequences)))
    table.add_row("whole copy", _gb(question.inventory.total(question.facts)), *[""] * 9, style="dim")
    return table


def _communication_table(assessed: Sequence[Assessment], batches: tuple[int, ...]) -> Table:
    table = _table("A MoE layer's collectives, KB sent a rank; busiest rank over mean (computed)")
    table.add_column("plan", no_wrap=True, min_width=10)
    table.add_column("collectives", min_width=14)
    for batch in batches:
        _add_figures(table, f"sent {batch}")
    for batch in batches:
        _add_figures(table, f"busy {batch}")
    for a in assessed:
        kinds = " ".join(c.kind for c in a.collectives[batches[0]]) or "none"
        sent = [f"{sent_bytes(a.collectives[batch]) / 1e3:.1f}" for batch in batches]
        table.add_row(str(a.layout), kinds, *sent, *(f"{a.straggler[batch]:.2f}" for batch in batches))
        if a.alternative:
            sent = [f"{sent_bytes(a.alternative[batch]) / 1e3:.1f}" for batch in batches]
            table.add_row(" by DeepEP", "all_to_all", *sent, *[""] * len(sent), style="dim")
    return table


def _print_divisibility(console: Console, assessed: Sequence[Assessment], verdict: Verdict) -> None:
    chosen = {best.layout for best in (verdict.best, *verdict.by_engine.values()) if best}
    for a in assessed:
        if not (a.stock or a.blockers) or (a.layout.plan not in ("TP", "TEP") and a.layout not in chosen):
            continue
        console.print(f"\n[bold]{a.layout}[/] does not divide:")
        for blocker in a.blockers:
            _print_item(console, Text(f"{blocker}; neither ep2tp nor an engine changes that"))
        for field, (before, after) in (a.plan.fields if a.plan else {}).items():
            _print_item(
                console, Text(f"ep2tp pads {field} {before} -> {after} (+{after / before - 1:.1%}){_where(a, field)}")
            )
        for behaviour in a.stock:
            colour = {"runs": "green", "refuses": "yellow", "wrong in silence": "red"}[behaviour.outcome]
            line = Text(f"{behaviour.engine} {behaviour.versions}, {behaviour.what}: ")
            line.append(behaviour.outcome, style=colour)
            _print_item(console, line.append(f": {behaviour.text}"))


def _where(a: Assessment, field: str) -> str:
    """In which engines a field is padded, where not in both."""
    engines = a.padded_in
    if a.in_vllm and a.in_vllm.plan and field in a.in_vllm.plan.fields:
        engines = ("vLLM", "SGLang")
    return "" if not engines or "vLLM" in engines else f" in {' and '.join(engines)}"


def _print_verdict(console: Console, verdict: Verdict) -> None:
    console.print("\n[bold]Verdict[/] (times are computed bounds, not measured)")
    for reason in verdict.reasons:
        _print_item(console, Text(reason))
    for engine, launch in verdict.commands.items():
        console.print(Text(f"\n{engine}:" + (f"  ({launch.note})" if launch.note and launch.command else "")))
        console.print(Text(f"  {launch}", style="bold"), soft_wrap=True)


def _print_item(console: Console, text: Text) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(" -", text)
    console.print(grid)


def _runs(a: Assessment) -> str:
    if a.blockers:
        return "no: does not divide"
    if not a.is_served:
        return "no: in no engine"
    if not a.fits:
        return "no: too large"
    if a.plan is None:
        return "no: cannot be padded"
    return "yes" if a.divides else "padded" if a.plan.is_padded else "yes, see below"


def _table(title: str, gap: int = 1) -> Table:
    style = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "pad_edge": False}
    return Table(title=title, padding=(0, gap, 0, 0), **style)  # type: ignore[arg-type]


def _add_figures(table: Table, header: str) -> None:
    table.add_column(header, justify="right", no_wrap=True, min_width=max(6, len(header)))


def _gb(size: float) -> str:
    size /= GB
    return "-" if size == 0 else f"{size:.2f}" if size < 10 else f"{size:.1f}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
