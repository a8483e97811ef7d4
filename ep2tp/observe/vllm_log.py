"""What vLLM's log says about the plan: strings of 0.25.1, 0.28.0, 0.32.0 and 0.33.0."""

from __future__ import annotations

import re
from collections.abc import Collection

from ep2tp.observe.evidence import (
    ALL_REDUCE,
    DEP,
    DISPATCHED,
    MIXED,
    SLICED,
    TEP,
    TP,
    WHOLE,
    Reading,
    Strength,
)
from ep2tp.observe.layouts import vllm_worker
from ep2tp.observe.signs import Sign, always, message, tags

_MOE = "model_executor/layers/fused_moe"
_COMMUNICATORS = "distributed/device_communicators"


def _prepare_finalize(match: re.Match[str]) -> Reading:
    name = match["name"]
    if "NoDPEP" in name or name.startswith("Batched"):
        return Reading(f"{name}: the MoE layer dispatches nothing, as under TP and TEP", ALL_REDUCE)
    if "NaiveDPEP" in name:
        return Reading(f"{name}: tokens are gathered for the MoE layer and reduce-scattered back", DISPATCHED)
    return Reading(f"{name}: the MoE layer dispatches tokens to whole experts and combines the results", DEP)


def _asked(match: re.Match[str]) -> Reading:
    if "'enable_expert_parallel': True" in match["arguments"]:
        says = "the launch asked for expert parallelism; printed before ep2tp sees the launch, so it decides nothing"
        return Reading(says, WHOLE, Strength.HINT)
    return Reading("the launch did not ask for expert parallelism", SLICED, Strength.HINT)


def _rank(match: re.Match[str]) -> Reading:
    if match["world"] == "1":
        return Reading("one rank holds every expert whole (TP of one rank)", TP)
    return Reading("decides nothing: vLLM gives every rank an EP rank, whatever the plan", strength=Strength.NOTE)


def _config(match: re.Match[str]) -> Reading:
    sizes = dict(re.findall(r"\b(tensor|pipeline|data)_parallel_size=(\d+)", match["config"]))
    shown = ", ".join(f"{name} parallel {size}" for name, size in sizes.items())
    return Reading(
        f"vLLM {match['version']}: {shown}; the line does not tell expert parallelism", strength=Strength.NOTE
    )


def _all2all(match: re.Match[str]) -> Reading:
    return Reading(f"the all2all manager {match['name']} was built: there are data-parallel ranks", DISPATCHED)


SIGNS = (
    Sign(
        "arguments",
        "non-default args: ",
        message(r"non-default args: (?P<arguments>.*)"),
        _asked,
        origin=("entrypoints", '"non-default args: %s"'),
    ),
    Sign(
        "config",
        "Initializing a V1 LLM engine",
        message(r"Initializing a V1 LLM engine \(v(?P<version>[^)]*)\)(?P<config>.*)"),
        _config,
        is_last_valid=True,
        origin=("v1/engine/core.py", '"Initializing a V1 LLM engine (v%s) with config: %s"'),
    ),
    Sign(
        "rank",
        " is assigned as ",
        message(r"rank \d+ in world size (?P<world>\d+) is assigned as .*EP rank"),
        _rank,
        origin=("distributed/parallel_state.py", '"rank %s in world size %s is assigned as "'),
    ),
    Sign(
        "worker",
        "(Worker_",
        re.compile(r"^[^(]{0,80}\(Worker(?P<tags>(?:_[A-Z]+\d+)+) (?:pid|ip)="),
        lambda match: vllm_worker(tags(match["tags"])),
        origin=("v1/executor/multiproc_executor.py", 'process_name += f"_EP{ep_rank}"'),
    ),
    Sign(
        "experts",
        "Expert parallelism is enabled",
        message(
            r"\[EP Rank \d+/(?P<ranks>\d+)\] Expert parallelism is enabled\..*?experts: (?P<local>\d+)/(?P<all>\d+)"
        ),
        lambda m: Reading(
            f"expert parallelism is on: a rank of {m['ranks']} holds {m['local']} of {m['all']} experts, whole", WHOLE
        ),
        origin=(f"{_MOE}/expert_map_manager.py", '"[EP Rank %s/%s] Expert parallelism is enabled. Expert "'),
    ),
    Sign(
        "weight filter",
        "EP weight filter: ",
        message(r"EP weight filter: ep_size="),
        always(Reading("a rank loads its own experts only: experts are whole", WHOLE)),
        origin=("model_executor/model_loader/default_loader.py", '"EP weight filter: ep_size=%d, ep_rank=%d'),
    ),
    Sign(
        "all2all",
        " all2all manager.",
        message(r"Using (?P<name>\w+) all2all manager\."),
        _all2all,
        origin=(f"{_COMMUNICATORS}/cuda_communicator.py", '"Using %s all2all manager."'),
    ),
    Sign(
        "prepare finalize",
        "PrepareAndFinalize",
        message(r"Using (?P<name>\w*PrepareAndFinalize\w*)"),
        _prepare_finalize,
        origin=(f"{_MOE}/oracle/unquantized.py", 'logger.info_once("Using %s", prepare_finalize.__class__.__name__)'),
    ),
    Sign(
        "dp without ep",
        "Detected DP deployment",
        message(r"Detected DP deployment with no --enable-expert-parallel"),
        always(
            Reading("data parallelism without expert parallelism: sliced experts, tokens gathered and scattered", MIXED)
        ),
        origin=(f"{_MOE}/all2all_utils.py", '"Detected DP deployment with no --enable-expert-parallel. "'),
    ),
    Sign(
        "moe backend",
        " MoE backend",
        message(r"Using '?(?P<name>[\w-]+)'?(?: \w+)? MoE backend"),
        lambda match: Reading(f"the MoE layers' kernel: {match['name']}", strength=Strength.NOTE),
        is_last_valid=True,
        origin=(f"{_MOE}/oracle/unquantized.py", "MoE backend"),
    ),
    Sign(
        "all_reduce",
        " all-reduce backends ",
        message(r"Using (?P<names>\[[^]]*\]) all-reduce backends \(in dispatch order\) for group 'tp"),
        lambda match: Reading(
            f"all_reduce of the TP group runs on {match['names']}, in this order", strength=Strength.NOTE
        ),
        origin=(
            f"{_COMMUNICATORS}/cuda_communicator.py",
            '"Using %s all-reduce backends (in dispatch order) for group "',
        ),
    ),
)


def conclude(found: Collection[tuple[str, Reading]]) -> Reading | None:
    """What the lines that are missing say, once a launch has been read; ``found`` has its signs' names and readings."""
    names = {name for name, _ in found}
    has_whole_experts = any(reading.plans <= WHOLE and reading.strength is Strength.DECISIVE for _, reading in found)
    if has_whole_experts and not names & {"all2all", "dp without ep"}:
        says = "experts are whole, and no line names an all2all manager: nothing is dispatched"
        return Reading(says, TEP, Strength.SUPPORT)
    has_one_rank = any(name == "rank" and reading.plans == TP for name, reading in found)
    if "prepare finalize" in names and not has_whole_experts and "worker" not in names and not has_one_rank:
        return Reading("a MoE layer was built, and no line says '[EP Rank'", SLICED, Strength.SUPPORT)
    return None
