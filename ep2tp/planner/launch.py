"""The launch command of a plan, for vLLM and SGLang, with ep2tp's variables and NCCL's settings."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ep2tp.errors import ModelError
from ep2tp.model.encoder import uneven_encoder_heads
from ep2tp.model.families import config_parts
from ep2tp.planner.compare import Assessment, Question
from ep2tp.planner.divisibility import Behaviour
from ep2tp.planner.layouts import Layout
from ep2tp.planner.links import Link
from ep2tp.planner.memory import growth, shard_plan, usable_share


@dataclass(frozen=True)
class Launch:
    """A command line, or why there is none.

    Attributes:
        environment: variables to set.
        command: the command; empty where the engine cannot run the plan.
        note: what else to know.
    """

    environment: dict[str, str]
    command: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        """One line for a shell."""
        if not self.command:
            return f"# {self.note}"
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


def nccl_settings(link: Link, gpus: int) -> tuple[dict[str, str], list[str], str]:
    """(variables, vLLM's and SGLang's common flag, why) that suit a link: those of its profile, or of its kind.

    Empty for one GPU, which exchanges nothing.
    """
    if gpus == 1:
        return {}, [], ""
    no_custom = ["--disable-custom-all-reduce"]
    if link.environment is not None:
        measured = dict(link.environment)
        has_no_peers = measured.get("NCCL_P2P_DISABLE", "0") != "0" or measured.get("NCCL_P2P_LEVEL") in ("0", "LOC")
        return measured, no_custom if has_no_peers else [], "the variables of the measured profile" if measured else ""
    if link.name in ("pcie4", "pcie5"):
        note = "peer to peer across PCIe root ports, where ep2tp doctor proves it; elsewhere plan with --link host"
        return {"NCCL_P2P_LEVEL": "SYS"}, [], note
    if link.name == "host":
        return {"NCCL_P2P_DISABLE": "1"}, no_custom, "no peer to peer: NCCL stages through host memory"
    if link.name == "socket":
        return (
            {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
            no_custom,
            "sockets; between nodes set NCCL_SOCKET_IFNAME to the fast interface instead",
        )
    return {}, [], ""


def longest_context(question: Question) -> int:
    """Tokens beyond which engines refuse a launch: the model's ``max_position_embeddings``, where config.json says."""
    found = [part.get("max_position_embeddings") for part in config_parts(question.facts.config)]
    return min((n for n in found if isinstance(n, int) and n > 0), default=question.context)


def launches(question: Question, assessed: Assessment) -> dict[str, Launch]:
    """The plan's launch for ``vllm`` and ``sglang``."""
    return {"vllm": _vllm(question, assessed), "sglang": _sglang(question, assessed)}


def _vllm(question: Question, assessed: Assessment) -> Launch:
    layout, model = assessed.layout, _servable(question.facts.source)
    variables, flags, note = nccl_settings(question.link, question.gpus)
    if layout.plan == "TPxEP":
        return Launch({}, (), "vLLM cannot slice experts and spread them too; SGLang can")
    if why := refusal(question, assessed, "vLLM"):
        return Launch({}, (), why)
    sizes = {
        "TP": ["--tensor-parallel-size", str(layout.tp)],
        "TEP": ["--tensor-parallel-size", str(layout.tp), "--enable-expert-parallel"],
        "DEP": ["--data-parallel-size", str(layout.dp), "--enable-expert-parallel"],
        "TPxPP": ["--tensor-parallel-size", str(layout.tp), "--pipeline-parallel-size", str(layout.pp)],
    }[layout.plan]
    context = ["--max-model-len", str(min(question.context, longest_context(question)))]
    # vLLM slices an image encoder by heads, too, and stops where they do not divide.
    is_uneven = uneven_encoder_heads(question.facts.config, layout.attention_ranks) is not None
    encoder = ["--mm-encoder-tp-mode", "data"] if is_uneven else []
    command = ("vllm", "serve", model, *_revision(question), *sizes, *context, *encoder, *flags)
    return Launch(_mode(assessed) | variables, command, _note(assessed, note))


def _sglang(question: Question, assessed: Assessment) -> Launch:
    layout, model = assessed.layout, _servable(question.facts.source)
    variables, flags, note = nccl_settings(question.link, question.gpus)
    if why := refusal(question, assessed, "SGLang"):
        return Launch({}, (), why)
    ranks = str(layout.stage_ranks)
    sizes = {
        "TP": ["--tp-size", ranks],
        "TEP": ["--tp-size", ranks, "--ep-size", ranks],
        "DEP": ["--tp-size", ranks, "--dp-size", ranks, "--enable-dp-attention", "--ep-size", ranks],
        "TPxPP": ["--tp-size", str(layout.tp), "--pp-size", str(layout.pp)],
        "TPxEP": ["--tp-size", ranks, "--ep-size", str(layout.ep)],
    }[layout.plan]
    context = ["--context-length", str(min(question.context, longest_context(question)))]
    # SGLang's own default leaves more room for activations, so that on a tight fit none is left for the cache.
    memory = ["--mem-fraction-static", f"{usable_share(question.gpu.memory_gb):.2f}"]
    command = ("sglang", "serve", "--model-path", model, *_revision(question), *sizes, *context, *memory, *flags)
    return Launch(_mode(assessed) | variables, command, _note(assessed, note))


def refusal(question: Question, assessed: Assessment, engine: str) -> str:
    """Why an engine does not run a plan, and what can be done; empty where it runs it."""
    found = assessed.obstacle(engine)
    if found is None:
        return ""
    outcome = "refuses" if found.outcome == "refuses" else "goes wrong in silence with"
    name = engine if found.versions == "all" else f"{engine} {found.versions}"
    text = found.text.rstrip(".")
    return f"{name} {outcome} {found.what}: {text}{_remedy(question, assessed, found)}"


def _remedy(question: Question, assessed: Assessment, found: Behaviour) -> str:
    """A padded checkpoint, with what its routed experts then weigh: reshard pads every class of weights."""
    ranks = assessed.layout.stage_ranks
    if found in assessed.lacking or found.what.startswith("experts"):
        return ""
    try:
        plan = shard_plan(question.facts, Layout("TP", tp=ranks))
    except ModelError:
        return ""
    more = growth(plan, "routed") - 1
    cost = f", with {more:.0%} more of routed experts" if more else ""
    return f"; ep2tp reshard --tp {ranks} writes a checkpoint that divides{cost}: plan for that one to compare"


def _revision(question: Question) -> list[str]:
    return ["--revision", question.revision] if question.revision else []


def _mode(assessed: Assessment) -> dict[str, str]:
    if not assessed.layout.holds_whole_experts:
        return {"EP2TP": "on"}
    return {"EP2TP": "auto" if _is_padded(assessed) else "off"}


def _note(assessed: Assessment, note: str) -> str:
    if assessed.layout.holds_whole_experts and _is_padded(assessed):
        return "EP2TP=auto rewrites to TP without NVLink; keep whole experts with a checkpoint from ep2tp reshard"
    if assessed.engine == "vLLM":
        return "; ".join(part for part in ("vLLM 0.32 or later", note) if part)
    return note


def _servable(source: str) -> str:
    """What an engine is given: a config.json stands for its folder, another file for a model to be filled in."""
    path = Path(source)
    if not path.is_file():
        return source
    return str(path.parent) if path.name == "config.json" else "MODEL"


def _is_padded(assessed: Assessment) -> bool:
    return assessed.plan is not None and assessed.plan.is_padded
