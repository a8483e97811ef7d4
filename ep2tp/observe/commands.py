"""``ep2tp detect``.

Exit codes: 0 read (and with --expect: as expected), 1 a source cannot be read, 2 wrong usage, 3 not the expected plan.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ep2tp.observe.verdict import Verdict

_OTHER_PLAN = 3


class _Plans(click.ParamType[frozenset[str]]):
    """``tp`` or ``tp,tep``."""

    name = "plan"

    def convert(self, value: Any, param: Any, ctx: Any) -> frozenset[str]:
        names = frozenset(str(value).lower().split(","))
        if unknown := names - {"tp", "tep", "dep", "mixed"}:
            self.fail(f"{', '.join(sorted(unknown))}: use tp, tep, dep, mixed, or several with commas between")
        return names


@click.command("detect", short_help="Say which parallel plan an engine runs, from logs or a server.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as one JSON object.")
@click.option(
    "--expect", type=_Plans(), metavar="PLAN", help="Exit with 3 unless this plan (or one of tp,tep,...) is active."
)
def detect_command(sources: tuple[str, ...], as_json: bool, expect: frozenset[str] | None) -> None:
    """Say which parallel plan an engine runs, and why: TP, TEP, DEP or a mixture.

    \b
    SOURCE: a log of vLLM or SGLang, with NCCL's own lines where NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=COLL is set;
            a torch profiler trace; a server's URL; a process id; - for standard input.
    Several sources of one launch are read together.
    """
    from ep2tp.observe.boot_log import with_source
    from ep2tp.observe.source import read_source
    from ep2tp.observe.verdict import judge

    if sources.count("-") > 1:
        raise click.UsageError("-: standard input can be read only once; name it once")
    several = len(sources) > 1
    read = (with_source(read_source(source), source) if several else read_source(source) for source in sources)
    verdict = judge(piece for pieces in read for piece in pieces)
    click.echo(json.dumps(_as_json(verdict)) if as_json else _as_wide_as_the_terminal(_as_text(verdict)))
    if expect is not None and not {plan.lower() for plan in verdict.fits} <= expect:
        click.echo(f"Expected {' or '.join(sorted(expect)).upper()}; found {_found(verdict)}", err=True)
        sys.exit(_OTHER_PLAN)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "plan": verdict.plan.value,
        "engine": verdict.engine,
        "confidence": verdict.confidence,
        "evidence": [
            {"line": piece.line, "text": piece.text, "says": _says(verdict, i)}
            for i, piece in enumerate(verdict.evidence)
        ],
    }


def _as_text(verdict: Verdict) -> str:
    engine = {"vllm": "vLLM", "sglang": "SGLang"}.get(verdict.engine or "", "engine not named")
    lines = [f"{_found(verdict)}  ({engine}, confidence {verdict.confidence})"]
    for i, piece in enumerate(verdict.evidence):
        place = f"line {piece.line}: " if piece.line is not None else ""
        lines += [f"- {_says(verdict, i)}", f"    {place}{piece.text}"]
    if not verdict.evidence:
        lines.append("No line is one that ep2tp knows. Is it a log of vLLM 0.25 to 0.33 or SGLang 0.5.17 to 0.5.23?")
    return "\n".join(lines)


def _as_wide_as_the_terminal(text: str) -> str:
    """Lines wrapped under their own beginning on a terminal; as they are in a file or pipe."""
    if not sys.stdout.isatty():
        return text
    width, lines = shutil.get_terminal_size().columns, []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip(" -")))
        lines.append(textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False))
    return "\n".join(lines)


def _found(verdict: Verdict) -> str:
    from ep2tp.observe.evidence import ANY, Plan

    if verdict.plan is not Plan.UNKNOWN or verdict.fits == ANY:
        return verdict.plan.value
    return "unknown: " + " or ".join(plan.value for plan in Plan if plan in verdict.fits)


def _says(verdict: Verdict, i: int) -> str:
    from ep2tp.observe.evidence import Strength

    says = verdict.evidence[i].reading.says
    if i not in verdict.contradictions:
        return says
    other = verdict.evidence[verdict.contradictions[i]]
    where = f"line {other.line}" if other.line is not None else other.text
    verb = "overruled by" if verdict.evidence[i].reading.strength is Strength.HINT else "CONTRADICTS"
    return f"{says}; {verb} {where}: {other.reading.says}"
