"""What ``ep2tp reshard`` and ``ep2tp verify`` show a person: a progress bar, and what was done in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ep2tp.checkpoint.options import Options, Report, Result
from ep2tp.checkpoint.sample import seconds_for


@contextmanager
def progress_bar(label: str, is_quiet: bool) -> Iterator[Report]:
    """A bar with rate and remaining time on a terminal, nothing elsewhere."""
    if is_quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn(label),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def estimate(result: Result, source: Path, destination: Path, workers: int | None) -> float:
    """Seconds that a planned conversion will take."""
    return seconds_for(result.conversion, source, destination, workers or Options.workers)


def summary(result: Result, seconds: float | None) -> dict[str, Any]:
    """The outcome as JSON."""
    plan = result.conversion.plan
    return {
        "status": result.status,
        "layout": result.conversion.layout,
        "ranks": plan.ranks,
        "fields": {field: list(values) for field, values in plan.fields.items()},
        "bytes": sum(result.conversion.sizes().values()),
        "source_bytes": result.conversion.source_bytes,
        "written": result.written,
        "resumed": result.resumed,
        "left_out": list(result.conversion.left_out),
        "warnings": list(result.warnings),
        **({} if seconds is None else _dry(result, seconds)),
    }


def _dry(result: Result, seconds: float) -> dict[str, Any]:
    return {"disk_needed": result.needed, "disk_free": result.free, "estimated_seconds": float(f"{seconds:.3g}")}


def words(result: Result, source: str, destination: str, seconds: float | None) -> str:
    """The outcome in words, and its warnings."""
    return "\n".join([_outcome(result, source, destination, seconds), *(f"Warning: {w}." for w in result.warnings)])


def _outcome(result: Result, source: str, destination: str, seconds: float | None) -> str:
    conversion = result.conversion
    new, old, ranks = sum(conversion.sizes().values()), conversion.source_bytes, conversion.plan.ranks
    if result.status == "unneeded":
        return (
            f"Nothing to pad: {source} already divides into whole blocks over {ranks} ranks; use it as it is, or "
            "--link for a copy that shares its bytes. Nothing was written."
        )
    if result.status == "complete":
        return f"{destination} is finished already."
    fields = [f"{field} {before} -> {after}" for field, (before, after) in conversion.plan.fields.items()]
    lines = [f"{source} for {ranks} ranks, layout {conversion.layout}: " + (", ".join(fields) or "nothing is padded")]
    lines.append(
        f"{old / 1e9:.2f} GB -> {new / 1e9:.2f} GB ({new / old - 1:+.1%}) in {_files(len(conversion.sizes()))}"
    )
    if seconds is not None:
        lines.append(f"Needs {result.needed / 1e9:.2f} GB of disk, {result.free / 1e9:.2f} GB are free.")
        lines.append(f"Dry run, nothing was written. About {seconds:.0f} s at the speed of {destination}'s disk.")
    elif result.status == "part":
        lines.append(f"Wrote {result.written / 1e9:.2f} GB; run with --finish once all ranks are there.")
    else:
        before = f"; {_files(result.resumed)} there before" if result.resumed else ""
        lines.append(f"Wrote {result.written / 1e9:.2f} GB to {destination}{before}.")
    if left_out := conversion.left_out:
        named = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        lines.append(f"Left out, as the checkpoint's index does not name them: {named} ({_files(len(left_out))}).")
    return "\n".join(lines)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def show(outcome: dict[str, Any], quiet: bool, as_json: bool, text: str) -> None:
    """Print an outcome as the options ask for."""
    if as_json:
        click.echo(json.dumps(outcome))
    elif not quiet:
        click.echo(text)
