"""The doctor's report on a terminal or in a file."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ep2tp.doctor.finding import Finding, Level, verdict

_STYLES = {
    Level.OK: "green",
    Level.NOTE: "cyan",
    Level.UNCHECKED: "dim",
    Level.DEGRADED: "yellow",
    Level.BLOCKED: "bold red",
}


def print_report(findings: Sequence[Finding], console: Console) -> None:
    """Findings in the order of the checks, then the verdict with what to do first."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for i, finding in enumerate(findings):
        if i == 0 or finding.check != findings[i - 1].check:
            table.add_row("", Text(finding.check, style="bold"))
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), _body(finding))
    console.print(table)
    console.print()
    console.print(_conclusion(findings))


def _body(finding: Finding) -> Group:
    parts: list[Text | Padding] = [Text(finding.what)]
    if finding.why:
        parts.append(Padding(Text(f"why it matters: {finding.why}", style="dim"), (0, 0, 0, 2)))
    if finding.do:
        parts.append(Padding(Text(f"what to do: {finding.do}"), (0, 0, 0, 2)))
    return Group(*parts)


def _conclusion(findings: Sequence[Finding]) -> Text:
    outcome = verdict(findings)
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    unchecked = f"; {counts[Level.UNCHECKED]} not checked" if counts[Level.UNCHECKED] else ""
    style = {"ready": "bold green", "degraded": "bold yellow", "blocked": "bold red"}[outcome]
    count = f"{counts[Level.BLOCKED]} blocked, {counts[Level.DEGRADED]} degraded, {counts[Level.OK]} ok{unchecked}"
    return Text.assemble((outcome.upper(), style), f"  ({count})")
