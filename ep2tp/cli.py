"""The command line. Each command imports what it needs when it runs, so that ``ep2tp --help`` is quick."""

from __future__ import annotations

import sys

import click

from ep2tp import __version__
from ep2tp.checkpoint.commands import reshard_command, verify_command
from ep2tp.commands.plan import plan_command
from ep2tp.commands.tune import tune_command
from ep2tp.doctor.commands import doctor_command
from ep2tp.errors import Ep2tpError, NoExpertsError
from ep2tp.observe.commands import detect_command


class _Group(click.Group):
    """Shows ep2tp's own errors as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Ep2tpError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ep2tp")
def main() -> None:
    """Run expert-parallel MoE recipes with tensor parallelism only.

    Installed beside vLLM or SGLang, ep2tp needs no command: a launch that assumes expert parallelism runs as TP.
    EP2TP=auto|on|off says when. These commands show what it does, without an engine.
    """


@main.command(short_help="List the model families that ep2tp knows; show a model's slices.")
@click.option("--model", metavar="MODEL", help="Folder, config.json, or hub id (its config alone is fetched).")
@click.option("--tp", type=click.IntRange(1), help="With --model: show the slices over this many ranks.")
def patches(model: str | None, tp: int | None) -> None:
    """List the model families that ep2tp knows, whom each patch matches, and why."""
    from ep2tp.commands import listing
    from ep2tp.model.families import load_families
    from ep2tp.settings import Settings

    if model is not None:
        listing.print_model(model, tp)
    else:
        settings = Settings.from_environment()
        listing.print_families(load_families(settings.patches, settings.patch_path))


@main.command(
    short_help="Print a launch command as tensor parallel; start nothing.",
    context_settings={"allow_interspersed_args": False},  # from its first word on, all of COMMAND is COMMAND's
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def rewrite(command: tuple[str, ...]) -> None:
    """Print the tensor-parallel launch that COMMAND amounts to; nothing is started.

    \b
    ep2tp rewrite -- vllm serve MODEL --data-parallel-size 4 --enable-expert-parallel
    """
    from ep2tp.commands import listing
    from ep2tp.commands.engine_words import command_words, shell_line
    from ep2tp.commands.rewrite import model_of, rewrite_command
    from ep2tp.rewrite.parallel_plan import Limits

    words = command_words(command)
    try:
        facts, why_no_facts = listing.facts_for(model_of(words))
    except NoExpertsError as error:
        click.echo(shell_line(words))
        click.echo(f"{error}; nothing changed.", err=True)
        return
    limits = Limits(facts.heads, facts.kv_heads, facts.vocabulary) if facts else None
    rewritten = rewrite_command(words, limits, facts.config if facts else None)
    click.echo(shell_line(rewritten.words))
    listing.print_changes(rewritten.changes, facts, why_no_facts, rewritten.gpus)


@main.command(short_help="Run a recipe of a tiny model on this CPU, rewritten and not.")
@click.option("--engine", type=click.Choice(["vllm", "sglang"]), default="vllm", show_default=True)
@click.option("--tp", type=click.IntRange(2, 3), default=2, show_default=True, help="Ranks of the rewritten launch.")
@click.option("--keep", type=click.Path(file_okay=False), help="Folder for the tiny checkpoint and the logs.")
def demo(engine: str, tp: int, keep: str | None) -> None:
    """Run a tiny DeepSeek-V3 on this CPU: one rank, expert parallel, and rewritten to tensor parallel."""
    from pathlib import Path

    from ep2tp.demo.run import run_demo

    sys.exit(run_demo(engine, tp, Path(keep) if keep else None))


main.add_command(detect_command)
main.add_command(doctor_command)
main.add_command(plan_command)
main.add_command(reshard_command)
main.add_command(tune_command)
main.add_command(verify_command)
