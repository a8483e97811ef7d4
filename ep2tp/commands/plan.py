"""``ep2tp plan``: which parallel plan is best for a model on some GPUs, and what each would cost."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import click


class _Batches(click.ParamType[tuple[int, ...]]):
    """``1,8,64``: rising, without repeats."""

    name = "batches"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        try:
            found = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            found = []
        if not found or not 1 <= found[0] <= found[-1] <= 65536:
            self.fail(f"{value!r}: write batch sizes from 1 to 65536 as 1,8,64", param, ctx)
        return tuple(found)


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse ``nan`` and ``inf``, which compare as if they were in a range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of GB", ctx, param)
    return value


@click.command("plan", short_help="Compare parallel plans of a model; say which to run.")
@click.argument("model", required=False)
@click.option("--gpus", type=click.IntRange(1, 1024), help="GPUs of the launch.")
@click.option("--gpu", metavar="NAME", help="Which GPU, such as 'RTX PRO 6000' (default: this machine's).")
@click.option(
    "--memory",
    "memory_gb",
    type=click.FloatRange(1, min_open=True),
    callback=_finite,
    metavar="GB",
    help="Memory of a GPU.",
)
@click.option("--link", metavar="LINK", help="nvlink, pcie5, pcie4, host, socket, or a JSON file of --calibrate.")
@click.option("--batch", "batches", type=_Batches(), default="1,8,64", show_default=True, help="Sequences at once.")
@click.option("--context", type=click.IntRange(1), default=8192, show_default=True, help="Tokens of each sequence.")
@click.option("--prompt", type=click.IntRange(1, 1 << 20), default=2048, show_default=True, help="Tokens to prefill.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE.png", help="Draw time per token by batch.")
@click.option("--calibrate", is_flag=True, help="Measure this machine's collectives and memory, and store a profile.")
@click.option("--output", type=click.Path(dir_okay=False), metavar="FILE", help="With --calibrate: where to store it.")
def plan_command(model: str | None, gpus: int | None, calibrate: bool, output: str | None, **options: Any) -> None:
    """Compare parallel plans of MODEL on --gpus GPUs: memory, divisibility, communication, time; and say which to run.

    MODEL is a checkpoint folder, a config.json, or a hub id (config and safetensors headers alone are fetched). Plans:
    TP slices every expert, TEP spreads whole experts under one all_reduce, DEP dispatches tokens to them, TPxPP and
    TPxEP combine. Times are computed bounds.

    \b
    ep2tp plan deepseek-ai/DeepSeek-V3 --gpus 8 --gpu 'RTX PRO 6000' --link pcie5
    ep2tp plan --calibrate --gpus 2
    """
    if calibrate:
        _calibrate(gpus, output)
        if model is None:
            return
        options["link"] = options["link"] or output
    if model is None:
        raise click.UsageError("name a model: a folder, a config.json or a hub id (or only --calibrate)")
    if gpus is None:
        raise click.UsageError("--gpus says how many GPUs the launch has")
    if output is not None and not calibrate:
        raise click.UsageError("--output goes with --calibrate")
    if options["revision"] and Path(model).exists():
        raise click.UsageError(f"--revision goes with a hub model; {model} is on this machine")
    _plan(model, gpus, **options)


def _calibrate(gpus: int | None, output: str | None) -> None:
    from ep2tp.planner.calibrate import calibrate
    from ep2tp.planner.profile import profile_path

    path = Path(output) if output else profile_path()
    profile = calibrate(gpus, path)
    use = f"with --link {shlex.quote(output)}" if output else "on this machine unless --link is given"
    click.echo(f"{profile.link.label}\nstored; later plans use it {use}", err=True)


def _plan(
    model: str,
    gpus: int,
    gpu: str | None,
    memory_gb: float | None,
    link: str | None,
    batches: tuple[int, ...],
    context: int,
    prompt: int,
    revision: str | None,
    as_json: bool,
    plot: str | None,
) -> None:
    from ep2tp.planner.advise import advise
    from ep2tp.planner.compare import Question, assess_all
    from ep2tp.planner.machine import choose_gpu, choose_link
    from ep2tp.planner.plot import check_matplotlib
    from ep2tp.planner.plot import plot as draw
    from ep2tp.planner.source import load_model

    if plot is not None:
        check_matplotlib()
    chosen_link, chosen_gpu = choose_link(link, gpus, choose_gpu(gpu, memory_gb))
    facts, inventory = load_model(model, revision)
    question = Question(facts, inventory, gpus, chosen_gpu, chosen_link, batches, context, prompt, revision)
    assessed = assess_all(question)
    verdict = advise(question, assessed)
    if plot is not None:
        draw(question, assessed, Path(plot))
    if as_json:
        from ep2tp.planner.summary import summary

        click.echo(json.dumps(summary(question, assessed, verdict), indent=1))
        return
    from rich.console import Console

    from ep2tp.planner.report import print_report

    print_report(Console(highlight=False), question, assessed, verdict)
