"""The verdict: which plan, why, and when expert parallelism is the better or the only one. In plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ep2tp.planner import per_engine, whole_experts
from ep2tp.planner.choice import best_plan, fastest, headline, held_batches
from ep2tp.planner.compare import Assessment, Question, as_run_by
from ep2tp.planner.divisibility import ENGINES, slices_below_block
from ep2tp.planner.launch import Launch, launches, longest_context, nccl_settings, refusal
from ep2tp.planner.memory import GB, usable_bytes

_USUAL_NODE = 8  # GPUs; few machines have more


@dataclass(frozen=True)
class Verdict:
    """What to run.

    Attributes:
        best: the plan, or None where none fits; where padding differs between engines, by the padded figures.
        by_batch: the fastest plan of each batch, or None where no plan's KV cache holds it; figures as of ``best``.
        reasons: sentences, the most important first.
        ep_is_better: whether a plan with whole experts is clearly the fastest at some batch, or alone holds it.
        ep_is_unavoidable: whether only plans with whole experts run.
        where_ep_wins: the reason that says at which batches a plan with whole experts is the better one, those asked
            for or larger ones; empty where at none.
        commands: launches of each engine's best plan, by engine.
        by_engine: for ``vllm`` and ``sglang``, the best plan of those that it runs, with its figures; or None.
        by_batch_in_vllm: ``by_batch`` by vLLM's figures.
    """

    best: Assessment | None
    by_batch: dict[int, Assessment | None]
    reasons: tuple[str, ...]
    ep_is_better: bool
    ep_is_unavoidable: bool
    where_ep_wins: str
    commands: dict[str, Launch]
    by_engine: dict[str, Assessment | None]
    by_batch_in_vllm: dict[int, Assessment | None]


@dataclass(frozen=True)
class _Advice:
    """What is said of some plans; ``sections`` are lists of sentences."""

    best: Assessment | None
    by_batch: dict[int, Assessment | None]
    sections: tuple[list[str], ...]
    ep_is_better: bool = False
    ep_is_unavoidable: bool = False
    where_ep_wins: str = ""


def advise(question: Question, assessed: Sequence[Assessment]) -> Verdict:
    """Choose among assessed plans, for each engine among those that it runs, and say why."""
    whole = _advice(question, assessed)
    chosen = {engine: _best_in(question, assessed, engine) for engine in ENGINES}
    in_vllm = _advice(question, as_run_by("vLLM", assessed), "vLLM")
    if any(a.in_vllm for a in assessed):
        in_sglang = _advice(question, assessed, "SGLang")
        sections = per_engine.merged(in_vllm.sections, in_sglang.sections)
        sections.insert(2, [per_engine.WHICH_VLLM])
        wins = " ".join(per_engine.merged_lines([in_vllm.where_ep_wins], [in_sglang.where_ep_wins]))
    else:
        chosen = {engine: whole.best if _is_run(whole.best, engine) else best for engine, best in chosen.items()}
        sections = [*whole.sections, per_engine.other_choices(question, assessed, whole.best, chosen)]
        wins = whole.where_ep_wins
    commands = _commands(question, whole.best, chosen)
    sections.append(_one_node(question, commands))
    return Verdict(
        whole.best,
        whole.by_batch,
        tuple(line for section in sections for line in section),
        whole.ep_is_better,
        whole.ep_is_unavoidable,
        wins,
        commands,
        {engine.lower(): best for engine, best in chosen.items()},
        in_vllm.by_batch,
    )


def _advice(question: Question, assessed: Sequence[Assessment], engine: str | None = None) -> _Advice:
    """What is said of the plans that run, in one engine or in any."""
    running = [a for a in assessed if (a.runs if engine is None else a.runs_in(engine))]
    by_batch = {batch: fastest(running, batch) for batch in question.batches}
    if not running:
        return _Advice(None, by_batch, (_nothing_runs(question, assessed, engine),))
    best = best_plan(question, running)
    unavoidable = all(a.layout.plan in whole_experts.PLANS for a in running)
    won = whole_experts.batches_won(question, running)
    where_ep_wins = whole_experts.where_they_win(question, running, won)
    sections = (
        ["Expert parallelism is unavoidable here: no plan that slices every expert runs."] if unavoidable else [],
        headline(question, running, best),
        _context(question),
        _comparison(question, running, best),
        [where_ep_wins] if where_ep_wins else whole_experts.where_they_do_not(question, running),
        _what_does_not_run(question, assessed),
        _padding(question, best),
    )
    return _Advice(best, by_batch, sections, bool(won), unavoidable, where_ep_wins)


def _best_in(question: Question, assessed: Sequence[Assessment], engine: str) -> Assessment | None:
    running = [a for a in as_run_by(engine, assessed) if a.runs_in(engine)]
    return best_plan(question, running) if running else None


def _is_run(best: Assessment | None, engine: str) -> bool:
    return best is not None and best.runs_in(engine)


def _commands(
    question: Question, best: Assessment | None, chosen: Mapping[str, Assessment | None]
) -> dict[str, Launch]:
    """Each engine's launch; of an engine that runs no plan, why not the best one of the other."""
    fallback = best or next((a for a in chosen.values() if a is not None), None)
    if fallback is None:
        return {}
    found = {}
    for engine, own in chosen.items():
        launch = launches(question, own or fallback)[engine.lower()]
        has_room = own is not None or not launch.command
        found[engine.lower()] = launch if has_room else Launch({}, (), f"no plan fits in {engine}")
    return found


def _context(question: Question) -> list[str]:
    most = longest_context(question)
    if question.context <= most:
        return []
    return [
        f"Context {question.context} is beyond this model's max_position_embeddings, {most}: the figures are for "
        f"{question.context}, the launches for {most}, since engines refuse more."
    ]


def _comparison(question: Question, running: Sequence[Assessment], best: Assessment) -> list[str]:
    found = []
    for plan in ("TP", "TEP", "DEP"):
        other = next((a for a in running if a.layout.plan == plan and a is not best), None)
        if other is None or best.layout.plan == plan:
            continue
        batches = [batch for batch in held_batches(question, best) if other.holds(batch)]
        room = "" if len(batches) == len(held_batches(question, best)) else f"; it holds {other.sequences} sequences"
        if not batches:
            found.append(f"{other.layout} holds {other.sequences} sequences of this context at once.")
            continue
        parts = [f"{_times(other, best, b)} at batch {b}" for b in dict.fromkeys((batches[0], batches[-1]))]
        found.append(f"{other.layout} takes {' and '.join(parts)}{_because(other, best, batches[0])}{room}.")
    return found


def _times(other: Assessment, best: Assessment, batch: int) -> str:
    ratio = other.decode[batch].total / best.decode[batch].total
    return f"{ratio:.2f}x the time"


def _because(other: Assessment, best: Assessment, batch: int) -> str:
    there, here = other.decode[batch], best.decode[batch]
    if there.total <= here.total:
        return ""
    causes = {
        f"its busiest rank reads {other.straggler[batch]:.2f}x the experts of the mean one": (
            there.straggler - here.straggler
        ),
        "its collectives take longer": there.communication - here.communication,
        _why_weights(other): there.weights - here.weights,
        "it reads more KV cache a rank": there.cache - here.cache,
    }
    cause, cost = max(causes.items(), key=lambda item: item[1])
    return f": at batch {batch}, {cause} (+{cost:.2f} ms)" if cost > 0.01 * here.total else ""


def _why_weights(other: Assessment) -> str:
    if other.layout.dp > 1:
        return "every rank reads all of attention and the shared experts"
    return "it reads padding" if other.weights.padding else "a rank reads more weights"


def _what_does_not_run(question: Question, assessed: Sequence[Assessment]) -> list[str]:
    found = []
    for a in assessed:
        if a.layout.plan not in ("TP", "TEP", "DEP"):
            continue
        if why := _obstacle(question, a):
            found.append(why)
        elif not a.fits:
            usable = usable_bytes(question.gpu.memory_gb) / GB
            need = (a.weights.total + a.cache) / GB
            found.append(
                f"{a.layout} does not fit: {need:.1f} GB of weights and one sequence's KV cache in {usable:.1f} GB."
            )
    return found


def _padding(question: Question, best: Assessment) -> list[str]:
    found = []
    exact = best.plan.left_to_engine if best.plan else {}
    if best.weights.padding:
        size = f"+{best.weights.padding_share:.1%} of the MLP weights, {best.weights.padding / GB:.2f} GB a GPU"
        found.append(
            f"ep2tp pads what does not divide, in SGLang only: {size}; vLLM slices it itself, and its fullest rank "
            "holds as much."
            if best.padded_in == ("SGLang",)
            else f"ep2tp pads what does not divide: {size}."
        )
    found += [
        f"A slice of the {c.name} weights ({c.size}) is smaller than one block of {c.block}: some ranks hold nothing "
        "but padding; whole experts, or fewer ranks with pipeline stages, use the GPUs better."
        for c in slices_below_block(question.facts, best.layout)
        if c.name not in exact
    ]
    if why := nccl_settings(question.link, question.gpus)[2]:
        found.append(f"NCCL: {why}.")
    return found


def _one_node(question: Question, commands: Mapping[str, Launch]) -> list[str]:
    """What a launch of more GPUs than a usual machine has needs to know: there are machines with 16."""
    if question.gpus <= _USUAL_NODE or not any(launch.command for launch in commands.values()):
        return []
    return [
        f"The command is for one node with {question.gpus} GPUs. For several nodes, run it on each of them with "
        "--nnodes, --node-rank and the address of the first (docs/guides/multi-node.md)."
    ]


def _nothing_runs(question: Question, assessed: Sequence[Assessment], engine: str | None) -> list[str]:
    """What is in the way of all plans: memory of those that could run, or else what blocks them."""
    able = [a for a in assessed if not a.blockers and (a.is_served_by(engine) if engine else a.is_served)]
    if not able:
        return ["No plan runs on this number of GPUs, whatever their memory.", *_obstacles(question, assessed)]
    least = min(able, key=lambda a: a.weights.total + a.cache)
    usable = usable_bytes(question.gpu.memory_gb) / GB
    found = (
        f"No plan fits: {least.layout} needs least, {(least.weights.total + least.cache) / GB:.1f} GB a GPU, and "
        f"{usable:.1f} GB of a {question.gpu.name} are usable. Use more GPUs, a smaller quantisation or less --context."
    )
    return [found, *_obstacles(question, [a for a in assessed if a.fits])]


def _obstacles(question: Question, assessed: Sequence[Assessment]) -> list[str]:
    """Why plans do not run, whether they fit or not; first those that no padding helps."""
    return [why for a in sorted(assessed, key=lambda a: not a.blockers) if (why := _obstacle(question, a))]


def _obstacle(question: Question, a: Assessment) -> str:
    """What but memory keeps a plan from running; empty where nothing does."""
    if a.blockers:
        return f"{a.layout} cannot run: {a.blockers[0]}."
    return "" if a.is_served else f"{a.layout} runs in neither engine. {refusal(question, a, 'SGLang')}."
