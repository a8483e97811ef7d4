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
from ep2tp.planner.compare import Assessment, Question, as_run_by, assess_all
from ep2tp.planner.divisibility import ENGINES
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
not fit). Where vLLM 0.32 and later slice experts exactly that ep2tp pads in SGLang, each engine has a row; for an older
vLLM, SGLang's holds. {UNIT}

A published recipe with expert parallelism runs as these commands do, without being edited, once ep2tp is installed and
`EP2TP` is `auto` (without NVLink) or `on`."""


class Answer(NamedTuple):
    """What the planner says of a checkpoint on some GPUs; ``tp`` is plain tensor parallelism, padded."""

    question: Question
    tp: Assessment
    verdict: Verdict

    def tp_in(self, engine: str) -> Assessment:
        """Plain tensor parallelism as an engine runs it."""
        return as_run_by(engine, [self.tp])[0]

    @property
    def engines(self) -> list[str]:
        """The engines in which it runs."""
        return [engine for engine in ENGINES if self.tp_in(engine).runs]


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
        [row for gpus in SIZES for row in _rows(served, checkpoint, gpus)],
        range(1, 3 + len(GPUS)),
    )
    asked = [_ask(served, checkpoint, gpus, EXAMPLE) for gpus in SIZES]
    yield from _blocked(asked)
    yield from _too_large(asked)
    fitting = [answer for answer in asked if answer.engines]
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
    for engines, needs in _needs(asked).items():
        where = "" if len(engines) == len(ENGINES) else f" in {engines[0]}"
        yield (
            f"{listed(needs)} x {EXAMPLE}: does not fit{where}; weights and one sequence are {listed(needs.values())} "
            f"GB a GPU, of {USABLE} usable."
        )


def _needs(asked: list[Answer]) -> dict[tuple[str, ...], dict[str, str]]:
    """By the engines in which TP does not fit, and number of GPUs: the GB that the one that needs least would take."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for answer in asked:
        too_large = [engine for engine in ENGINES if not answer.tp_in(engine).fits]
        if too_large and not answer.tp.blockers:
            tp = answer.tp_in(too_large[0])
            found.setdefault(tuple(too_large), {})[str(answer.question.gpus)] = (
                f"{(tp.weights.total + tp.cache) / GB:.1f}"
            )
    return found


@cache
def _ask(served: Served, checkpoint: Checkpoint, gpus: int, gpu: str) -> Answer:
    facts, inventory = model(served.name, checkpoint.form)
    facts = replace(facts, source=checkpoint.hub)
    question = Question(facts, inventory, gpus, find_gpu(gpu), built_in()[LINK], context=CONTEXT)
    assessed = assess_all(question)
    return Answer(question, next(a for a in assessed if a.layout.plan == "TP"), advise(question, assessed))


def _rows(served: Served, checkpoint: Checkpoint, gpus: int) -> Iterator[tuple[str, ...]]:
    answers = [_ask(served, checkpoint, gpus, gpu) for gpu in GPUS]
    if answers[0].tp.in_vllm is None:
        yield _row(str(gpus), [answer.tp for answer in answers])
        return
    for engine in ENGINES:
        yield _row(f"{gpus}, {engine}", [answer.tp_in(engine) for answer in answers])


def _row(name: str, by_gpu: list[Assessment]) -> tuple[str, ...]:
    """A row; of ``by_gpu`` the weights are the same."""
    fits = [f"{tp.sequences:,}" if tp.runs else "no" for tp in by_gpu]
    tp = by_gpu[-1]
    if tp.blockers:
        return (name, "—", "—", *["no"] * len(by_gpu))
    padding = f"+{tp.weights.padding_share:.0%}" if tp.weights.padding_share >= 0.005 else "none"
    return (name, f"{tp.weights.total / GB:.1f}", padding, *fits)


def _commands(fitting: list[Answer]) -> str:
    blocks = []
    for engine in ENGINES:
        lines = [
            f"    # {answer.question.gpus} x {EXAMPLE}\n    "
            f"{_wrapped(str(launches(answer.question, answer.tp)[engine.lower()]))}"
            for answer in fitting
            if engine in answer.engines
        ]
        body = "\n\n".join(lines) or f"    # none fits in {engine}"
        blocks.append(f'=== "{engine}"\n\n    ```bash\n{body}\n    ```')
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
    if any(answer.tp.padded_in == ("SGLang",) for answer in asked):
        yield (
            "The padding is ep2tp's, in SGLang only. vLLM slices these experts itself, in whole blocks, so that its "
            "fullest rank holds as much."
        )
    other = [found for answer in asked if (found := _preferred(answer))]
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


def _preferred(answer: Answer) -> str:
    """Which plan is preferred to plain tensor parallelism that runs, and in which engine if not in both; or nothing."""
    if answer.tp.in_vllm is None:
        chosen = {"": answer.verdict.best} if answer.tp.runs else {}
    else:
        chosen = {f" in {engine}": answer.verdict.by_engine[engine.lower()] for engine in answer.engines}
    plans = {where: best.layout for where, best in chosen.items() if best and best.layout != answer.tp.layout}
    if not plans:
        return ""
    if len(plans) == len(ENGINES) and len(set(plans.values())) == 1:
        plans = {"": next(iter(plans.values()))}
    return f"{answer.question.gpus} GPUs: " + ", ".join(f"{layout}{where}" for where, layout in plans.items())


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
        answers = [_ask(served, checkpoint, gpus, gpu) for gpus in SIZES]
        least = next((answer for answer in answers if answer.engines), None)
        where = f", {least.engines[0]}" if least and len(least.engines) < len(ENGINES) else ""
        found.append(f"{least.question.gpus}{where}" if least else "—")
    return found
