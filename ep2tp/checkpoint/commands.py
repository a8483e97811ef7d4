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
from typing import Any

import click

from ep2tp.errors import Ep2tpError, SettingError

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
        click.option(
            "--config", type=click.Path(exists=True, dir_okay=False), help="config.json for a SOURCE that has none."
        ),
        click.option("--workers", type=click.IntRange(1), help="Threads (default: CPU cores + 2, at most 8)."),
        click.option("--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object."),
    ):
        command = option(command)
    return command


@click.command("reshard", short_help="Write a checkpoint whose slices are whole blocks.")
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
    from ep2tp.checkpoint import console
    from ep2tp.checkpoint.reshard import reshard

    seconds = None
    with _errors(as_json), console.progress_bar("converting", quiet or as_json or options["dry_run"]) as report:
        result = reshard(source, destination, report=report, **options)
        if result.status == "planned":
            seconds = console.estimate(result, Path(source), Path(destination), options["workers"])
    text = console.words(result, source, destination, seconds)
    console.show(console.summary(result, seconds), quiet, as_json, text)


@click.command("verify", short_help="Prove what reshard wrote, byte for byte.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--source", help="The original: prove that every expert is bit for bit the same.")
@_source_options
def verify_command(folder: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Check the hashes of a folder that ep2tp reshard wrote, and with --source every byte of every tensor."""
    from ep2tp.checkpoint import console
    from ep2tp.checkpoint.verify import verify
    from ep2tp.errors import DifferenceError

    try:
        with _errors(as_json), console.progress_bar("verifying", quiet or as_json) as report:
            found = verify(folder, report=report, **options)
    except DifferenceError as error:
        if as_json:
            differences = str(error).splitlines()
            click.echo(json.dumps({"status": "different", "difference": differences[0], "differences": differences}))
        click.echo(f"Different: {error}", err=True)
        sys.exit(_DIFFERENT)
    text = f"{found.files} files have the manifest's SHA-256"
    if found.tensors:
        text += f"; {found.tensors} tensors equal the source bit for bit, and the padding is zeros with scale 1"
    console.show({"status": "same", "files": found.files, "tensors": found.tensors}, quiet, as_json, text)


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
