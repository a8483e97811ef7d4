"""The serving guides: what of each model fits 2, 4 and 8 GPUs under tensor parallelism, and the commands.

Everything comes from the planner, asked as ``ep2tp plan config.json`` asks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from docs.generate.markdown import listed, table
from docs.generate.published import PAGES, Checkpoint, Served
from ep2tp.planner.advise import Verdict, advise
from ep2tp.planner.compare import Assessment, Question, assess_all
from ep2tp.planner.gpus import find_gpu
from ep2tp.planner.launch import launches
from ep2tp.planner.links import built_in
from ep2tp.planner.memory import GB, usable_bytes
from tests.planner.models import model

SIZES = (2, 4, 8)
EXAMPLE = "RTX PRO 6000"
GPUS = {EXAMPLE: "PRO 6000", "RTX 5090": "5090", "L40S": "L40S", "A100 80GB PCIe": "A100"}
HEADERS = [f"{short}, {find_gpu(name).memory_gb:.0f}&nbsp;GB" for name, short in GPUS.items()]
MEMORY = find_gpu(EXAMPLE).memory_gb
USABLE = f"{usable_bytes(MEMORY) / GB:.1f}"
UNIT = (
    f"GB are 1e9 bytes, also in the names of the columns: the 96 GB by which NVIDIA names the {EXAMPLE} are\n"
    f"{MEMORY:.0f} of these, of which {USABLE} are counted as usable (90% less 2 GB)."
)
LINK = "pcie5"
CONTEXT = 8192
HOW = f"""
Every figure on this page is **computed** by `ep2tp plan` from the model's `config.json`, for a context of {CONTEXT:,}
tokens and link `{LINK}`; none was measured. How the figures come about: [planning](../../planning.md). On your machine:

    ep2tp plan MODEL --gpus 4 --gpu 'RTX PRO 6000' --link pcie5 --context 32768

**Run [`ep2tp doctor`](../../doctor.md) first.** The commands are for machines on which it proves peer-to-peer copies
(P2P) between the GPUs; `NCCL_P2P_LEVEL=SYS` lets NCCL use them. On any other machine put `NCCL_P2P_DISABLE=1` in its
place and add `--disable-custom-all-reduce`, in vLLM and in SGLang: `ep2tp plan --link host` prints the commands so.
Some drivers report P2P that does not work (two RTX PRO 6000:
[nccl#1999](https://github.com/NVIDIA/nccl/issues/1999)). There the commands below hang in their first all_reduce, or
serve garbage.

The tables show plain tensor parallelism: GB of weights a GPU, how much ep2tp's padding adds to the MLP weights, and for
each kind of GPU how many sequences of {CONTEXT:,} tokens fit beside the weights ("no": the weights and one sequence do
not fit). {UNIT}

A published recipe with expert parallelism runs as these commands do, without being edited, once ep2tp is installed and
`EP2TP` is `auto` (without NVLink) or `on`."""


class Answer(NamedTuple):
    """What the planner says of a checkpoint on some GPUs; ``tp`` is plain tensor parallelism."""

    question: Question
    tp: Assessment
    verdict: Verdict


def pages() -> dict[str, str]:
    """The text of each page by its name; ``index`` lists what fits."""
    found = {name: _page(title, models) for name, (title, models) in PAGES.items()}
    return {"index": _index(), **found}


def _page(title: str, models: tuple[Served, ...]) -> str:
    parts = [f"# {title} without NVLink", _COMMENT + HOW]
    for served in models:
        parts += list(_model(served))
    return "\n\n".join(parts) + "\n"


_COMMENT = "<!-- written by python -m docs.generate; edit docs/generate/serving.py -->\n"


def _model(served: Served) -> Iterator[str]:
    facts, _ = model(served.name, served.checkpoints[0].form)
    sizes = ", ".join(f"{c.name} {c.size}" for c in facts.classes)
    yield f"## {served.title}"
    yield (
        f"{facts.experts} experts, top {facts.top_k}, hidden {facts.hidden}, {facts.layers} layers; "
        f"MLP sizes: {sizes}. Patch [`{facts.family.name}`](../../reference/support.md#patches)."
    )
    yield "\n".join(f"- {hazard}" for hazard in facts.family.hazards)
    for checkpoint in served.checkpoints:
        yield from _checkpoint(served, checkpoint)


def _checkpoint(served: Served, checkpoint: Checkpoint) -> Iterator[str]:
    facts, inventory = model(served.name, checkpoint.form)
    if len(served.checkpoints) > 1:
        yield f"### {served.title}, {checkpoint.form}"
    yield _named(checkpoint, f"{inventory.total(facts) / GB:.1f} GB of weights")
    yield table(
        ("GPUs", "GB a GPU", "padding", *HEADERS),
        [_row(served, checkpoint, gpus) for gpus in SIZES],
        range(1, 3 + len(GPUS)),
    )
    asked = [_ask(served, checkpoint, gpus, EXAMPLE) for gpus in SIZES]
    yield from _blocked(asked)
    yield from _too_large(asked)
    fitting = [answer for answer in asked if answer.tp.runs]
    if not fitting:
        yield "Tensor parallelism needs more GPUs, or [several machines](../multi-node.md)."
        return
    yield _commands(fitting)
    yield from _notes(asked)


def _named(checkpoint: Checkpoint, size: str) -> str:
    others = listed(f"`{hub}`" for hub in checkpoint.others) if checkpoint.others else ""
    if checkpoint.hub == "MODEL":
        return (
            f"{checkpoint.form}, such as {others}: {size} with all but the routed experts in BF16. Put yours in the "
            "place of MODEL; `ep2tp plan` counts it as it is."
        )
    more = f" {others}: the same shape and format." if others else ""
    return f"`{checkpoint.hub}`, {checkpoint.form}: {size}.{more}"


def _blocked(asked: list[Answer]) -> Iterator[str]:
    for question, tp, verdict in asked:
        if tp.blockers:
            runs = f"; {verdict.best.layout} runs" if verdict.best else ""
            yield f"{question.gpus} GPUs: {tp.blockers[0]}, whatever the GPU, and ep2tp does not pad those{runs}."


def _too_large(asked: list[Answer]) -> Iterator[str]:
    needs = {
        str(question.gpus): f"{(tp.weights.total + tp.cache) / GB:.1f}"
        for question, tp, _ in asked
        if not (tp.blockers or tp.fits)
    }
    if needs:
        yield (
            f"{listed(needs)} x {EXAMPLE}: does not fit; weights and one sequence are {listed(needs.values())} GB a "
            f"GPU, of {USABLE} usable."
        )


@cache
def _ask(served: Served, checkpoint: Checkpoint, gpus: int, gpu: str) -> Answer:
    facts, inventory = model(served.name, checkpoint.form)
    facts = replace(facts, source=checkpoint.hub)
    question = Question(facts, inventory, gpus, find_gpu(gpu), built_in()[LINK], context=CONTEXT)
    assessed = assess_all(question)
    return Answer(question, next(a for a in assessed if a.layout.plan == "TP"), advise(question, assessed))


def _row(served: Served, checkpoint: Checkpoint, gpus: int) -> tuple[str, ...]:
    fits = []
    for gpu in GPUS:
        tp = _ask(served, checkpoint, gpus, gpu).tp
        fits.append(f"{tp.sequences:,}" if tp.runs else "no")
    if tp.blockers:
        return (str(gpus), "—", "—", *["no"] * len(GPUS))
    padding = f"+{tp.weights.padding_share:.0%}" if tp.weights.padding_share >= 0.005 else "none"
    return (str(gpus), f"{tp.weights.total / GB:.1f}", padding, *fits)


def _commands(fitting: list[Answer]) -> str:
    blocks = []
    for engine, name in (("vllm", "vLLM"), ("sglang", "SGLang")):
        lines = [
            f"    # {question.gpus} x {EXAMPLE}\n    {_wrapped(str(launches(question, tp)[engine]))}"
            for question, tp, _ in fitting
        ]
        body = "\n\n".join(lines)
        blocks.append(f'=== "{name}"\n\n    ```bash\n{body}\n    ```')
    return "\n\n".join(blocks)


def _wrapped(command: str) -> str:
    """The command over two lines: variables and model, then the flags that say how."""
    head, flag, tail = command.partition(" --t")
    return f"{head} \\\n        {flag.strip()}{tail}"


def _notes(asked: list[Answer]) -> Iterator[str]:
    facts = asked[0].question.facts
    unread = [name for key, name in (("vllm", "vLLM"), ("sglang", "SGLang")) if key not in facts.family.checked]
    if unread:
        yield f"The model code of {unread[0]} was not compared with this patch."
    other = [
        f"{question.gpus} GPUs: {verdict.best.layout}"
        for question, tp, verdict in asked
        if tp.runs and verdict.best is not None and verdict.best is not tp
    ]
    if other:
        batches = ", ".join(map(str, asked[0].question.batches))
        yield (
            f"Over batches {batches}, the planner prefers another plan, for a shorter decode step or more room for "
            f"sequences, on {'; '.join(other)}: [choosing a plan](../choosing-a-plan.md)."
        )
    wins = [
        f"- {question.gpus} GPUs: {verdict.where_ep_wins}" for question, _, verdict in asked if verdict.where_ep_wins
    ]
    if wins:
        yield (
            "The planner's verdict also says where [expert parallelism is right](../../concepts/when-ep.md); with "
            "`EP2TP=off` such a launch runs as given:"
        )
        yield "\n".join(wins)


def _index() -> str:
    rows = [
        (f"[{served.title}]({page}.md)", checkpoint.form, *_least(served, checkpoint))
        for page, (_, models) in PAGES.items()
        for served in models
        for checkpoint in served.checkpoints
    ]
    return (
        "\n\n".join(
            [
                "# Serving without NVLink: what fits",
                _COMMENT
                + f"""
The fewest GPUs of a machine, of 2, 4 and 8, on which a model runs with plain tensor parallelism, by kind of GPU:
weights, and one sequence of {CONTEXT:,} tokens. "—": not on 8. **Computed** by the planner from each model's
`config.json`, not measured; the pages have the weights a GPU, the sequences that fit, and the commands.
{UNIT}""",
                table(("model", "format", *HEADERS), rows, range(2, 2 + len(GPUS))),
                """
Models that are not listed: `ep2tp plan MODEL --gpus N --gpu NAME` answers for every family of the
[supported models](../../reference/support.md), from the checkpoint itself. A plan with pipeline stages sometimes fits
where tensor parallelism does not: [choosing a plan](../choosing-a-plan.md).""".strip(),
            ]
        )
        + "\n"
    )


def _least(served: Served, checkpoint: Checkpoint) -> list[str]:
    found = []
    for gpu in GPUS:
        runs = (gpus for gpus in SIZES if _ask(served, checkpoint, gpus, gpu).tp.runs)
        found.append(str(next(runs, "—")))
    return found
