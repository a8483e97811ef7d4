"""``ep2tp tune``: finds the fastest kernel configurations for this GPU and a model's slices."""

from __future__ import annotations

from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ep2tp.errors import SettingError

if TYPE_CHECKING:
    from ep2tp.kernels.slices import Slice
    from ep2tp.model.facts import ModelFacts

_ENGINES = ("vllm", "sglang")


@click.command("tune", short_help="Find the fastest MoE kernel configurations for this GPU.")
@click.argument("model")
@click.option("--tp", type=click.IntRange(1), required=True, help="Tensor-parallel size: the slices to tune for.")
@click.option("--seconds", type=click.IntRange(10), default=900, show_default=True, help="For everything.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Where to write.")
@click.option(
    "--engine", type=click.Choice(_ENGINES), help="Whose kernel to tune and compare with (default: installed)."
)
def tune_command(model: str, tp: int, seconds: int, out: Path | None, engine: str | None) -> None:
    """Find the fastest kernel configurations for this GPU and one rank's experts of MODEL at --tp.

    Times ep2tp's fused-MoE kernel and the engine's Triton kernel with cold caches. Writes ep2tp's table, which launches
    read from ~/.cache/ep2tp/configs (where it goes without --out), and the file by which the stock engine tunes its own
    kernel. Needs one GPU, not the model's weights. Interrupt it at any time: what was found is written.

    \b
    ep2tp tune deepseek-ai/DeepSeek-V3 --tp 8
    """
    from ep2tp.planner.source import load_facts

    facts = load_facts(model)
    name = _engine(engine)
    device = _device()
    slices = slices_for(facts, tp, name)
    from ep2tp.kernels.tuned_configs import user_folder

    for s in slices:
        if not _tune(s, name, device, seconds / len(slices), out or user_folder()):
            break


def slices_for(facts: ModelFacts, ranks: int, engine: str) -> list[Slice]:
    """The slices for which an engine's kernels are tuned: SGLang may append shared experts to the routed ones."""
    from ep2tp.kernels.slices import slice_of

    if engine == "sglang":
        shared = int(facts.config.get("n_shared_experts") or 0)
        plain = slice_of(facts, ranks)
        return [plain, slice_of(facts, ranks, fused_shared=shared)] if shared else [plain]
    from ep2tp.engines.vllm.experts import left_to_engine

    return [slice_of(facts, ranks, refines="routed" in left_to_engine(facts, ranks, "triton"))]


def _engine(asked: str | None) -> str:
    for name in (asked,) if asked else _ENGINES:
        if util.find_spec(name) is not None:
            return name
    raise SettingError(
        f"{asked or 'neither vLLM nor SGLang'} is not installed here, and tune compares with an engine's own kernel: "
        "run it in the environment that serves the model"
    )


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SettingError(
            "ep2tp tune times kernels, and PyTorch sees no CUDA GPU here; run it on the machine that serves the model "
            "(one idle GPU is enough), and copy what it writes with --out to others with the same GPU"
        )
    return str(torch.cuda.get_device_name())


def _tune(s: Slice, engine_name: str, device: str, seconds: float, folder: Path) -> bool:
    """Tune for one slice and write what was found; False where that was interrupted."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ep2tp.kernels.tune import TOKENS, Timed, Tuning, tune

    engine = import_module(f"ep2tp.engines.{engine_name}.tuning")
    is_whole, console, tuning = True, Console(stderr=True, highlight=False), Tuning(s, device, engine_name)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console.print(f"{s} on {device}, at most {seconds:.0f} s; ep2tp's kernel and {engine.NAME}'s")
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("tokens timed", total=len(TOKENS))

            def tell(found: Timed) -> None:
                console.print(_line(found, engine.NAME))
                bar.advance(task)

            with torch.device("cuda"):
                tune(tuning, engine, seconds, tell, torch.cuda.get_device_capability())
    except KeyboardInterrupt:
        is_whole = False
        console.print("Interrupted; writing what was found.")
    finally:
        for path in tuning.write(folder, _engine_file(engine, s)):
            click.echo(path)
    console.print(f"Stock {engine.NAME} uses its file with {engine.VARIABLE}={folder / engine_name}")
    return is_whole


def _engine_file(engine: Any, s: Slice) -> Path:
    import torch

    from ep2tp.kernels.operands import ExpertWeights

    path: Path = engine.file_path(
        ExpertWeights(torch.empty(s.experts, s.hidden, s.size, device="meta"), None, s.format)
    )
    return path


def _line(found: Any, engine: str) -> str:
    whose = "ep2tp's" if found.wins else f"{engine}'s"
    times = f"ep2tp {found.ours_ms * 1e3:.1f} us, {engine} tuned {found.engine_ms * 1e3:.1f} us"
    return f"  M={found.tokens}: {times}, untuned {found.default_ms * 1e3:.1f} us: {whose}"
