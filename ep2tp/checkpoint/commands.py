"""``ep2tp reshard`` and ``ep2tp verify``.

Exit codes: 0 done (or nothing to do), 1 refused or failed (what is done is kept), 2 wrong usage, 3 verify found a
difference.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ep2tp.errors import Ep2tpError, SettingError

if TYPE_CHECKING:
    from ep2tp.checkpoint.options import Report, Result

_DIFFERENT = 3


class _Ranks(click.ParamType[list[int]]):
    """``0-3`` or ``0,2,5-7``."""

    name = "ranks"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        spans = [re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part) for part in str(value).split(",")]
        ranks = [range(int(span[1]), int(span[2] or span[1]) + 1) for span in spans if span]
        if None in spans or not all(ranks):
            self.fail(f"{value!r}: write ranks as 0-3 or 0,2,5-7")
        return sorted({rank for span in ranks for rank in span})


def _source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--revision", help="Branch, tag or commit of a hub model."),
        click.option("--stream", is_flag=True, help="Hold one file of a hub model at a time on disk."),
        click.option("--config", type=click.Path(exists=True, dir_okay=False), help="config.json of a source without."),
        click.option("--workers", type=click.IntRange(1), help="Threads (default: CPU cores + 2, at most 8)."),
        click.option("--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object."),
    ):
        command = option(command)
    return command


@click.command("reshard")
@click.argument("source")
@click.argument("destination", type=click.Path(file_okay=False))
@click.option("--tp", type=click.IntRange(1), required=True, help="Tensor-parallel size to write for.")
@click.option("--layout", type=click.Choice(["padded", "ranks"]), default="padded", show_default=True)
@click.option("--ranks", type=_Ranks(), help="With --layout ranks: write these ranks only (rank 0 brings 'shared').")
@click.option("--finish", is_flag=True, help="With --layout ranks: check that all ranks are there, write the manifest.")
@click.option("--link", is_flag=True, help="Clone or hard-link files that need no change.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier conversion wrote to DESTINATION.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@_source_options
def reshard_command(source: str, destination: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write SOURCE (a folder or hub model) to DESTINATION with slices that are whole blocks at --tp.

    \b
    padded: a Hugging Face checkpoint for stock vLLM and SGLang at this tensor-parallel size
    ranks:  a folder per rank, for vLLM with --load-format ep2tp; each rank reads its own bytes only

    Interrupted? Run the same command again: finished files are kept.
    """
    from ep2tp.checkpoint.reshard import reshard

    seconds = None
    with _errors(as_json), _progress(quiet or as_json or options["dry_run"]) as report:
        result = reshard(source, destination, report=report, **options)
        if result.status == "planned":
            seconds = _estimate(result, Path(source), Path(destination), options["workers"])
    _print(_summary(result, seconds), quiet, as_json, _words(result, source, destination, seconds))


@click.command("verify")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--source", help="The original: prove that every expert is bit for bit the same.")
@_source_options
def verify_command(folder: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Check the hashes of a folder that ep2tp reshard wrote, and with --source every byte of every tensor."""
    from ep2tp.checkpoint.verify import verify
    from ep2tp.errors import DifferenceError

    try:
        with _errors(as_json):
            found = verify(folder, **options)
    except DifferenceError as error:
        if as_json:
            click.echo(json.dumps({"status": "different", "difference": str(error)}))
        click.echo(f"Different: {error}", err=True)
        sys.exit(_DIFFERENT)
    text = f"{found.files} files have the manifest's SHA-256"
    if found.tensors:
        text += f"; {found.tensors} tensors equal the source bit for bit, and the padding is zeros with scale 1"
    _print({"status": "same", "files": found.files, "tensors": found.tensors}, quiet, as_json, text)


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Show ep2tp's errors as one line, also where the command is not run by ``ep2tp``'s own group."""
    from ep2tp.errors import DifferenceError

    try:
        yield
    except DifferenceError:
        raise
    except Ep2tpError as error:
        if as_json:
            click.echo(json.dumps({"status": "failed", "error": str(error)}))
        is_usage = isinstance(error, SettingError)
        raise (click.UsageError if is_usage else click.ClickException)(str(error)) from error


@contextmanager
def _progress(is_quiet: bool) -> Iterator[Report]:
    if is_quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("converting"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _estimate(result: Result, source: Path, destination: Path, workers: int | None) -> float:
    from ep2tp.checkpoint.options import Options
    from ep2tp.checkpoint.sample import seconds_for

    return seconds_for(result.conversion, source, destination, workers or Options.workers)


def _summary(result: Result, seconds: float | None) -> dict[str, Any]:
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
        **({} if seconds is None else _dry(result, seconds)),
    }


def _dry(result: Result, seconds: float) -> dict[str, Any]:
    return {"disk_needed": result.needed, "disk_free": result.free, "estimated_seconds": float(f"{seconds:.3g}")}


def _words(result: Result, source: str, destination: str, seconds: float | None) -> str:
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
    lines.append(f"{old / 1e9:.2f} GB -> {new / 1e9:.2f} GB ({new / old - 1:+.1%}) in {len(conversion.sizes())} files")
    if seconds is not None:
        lines.append(f"Needs {result.needed / 1e9:.2f} GB of disk, {result.free / 1e9:.2f} GB are free.")
        lines.append(f"Dry run, nothing was written. About {seconds:.0f} s at the speed of {destination}'s disk.")
    elif result.status == "part":
        lines.append(f"Wrote {result.written / 1e9:.2f} GB; run with --finish once all ranks are there.")
    else:
        lines.append(f"Wrote {result.written / 1e9:.2f} GB to {destination}; {result.resumed} files were there before.")
    return "\n".join(lines)


def _print(summary: dict[str, Any], quiet: bool, as_json: bool, text: str) -> None:
    if as_json:
        click.echo(json.dumps(summary))
    elif not quiet:
        click.echo(text)
