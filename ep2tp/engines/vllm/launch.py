"""One vLLM launch: decides whether it is rewritten, and rewrites its arguments in place."""

from __future__ import annotations

import os
from typing import Any

from ep2tp.engines import seams as engine_seams
from ep2tp.engines.decision import Decision, decide
from ep2tp.engines.vllm import arguments as vllm_arguments
from ep2tp.engines.vllm import seams
from ep2tp.engines.vllm.model_config import read_model_config
from ep2tp.errors import LaunchError, ModelError
from ep2tp.rewrite import guard
from ep2tp.rewrite.parallel_plan import Change, Limits, assumes_expert_parallelism, to_tensor_parallel
from ep2tp.settings import Mode, Settings

_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
_PROCESS_PER_RANK = "VLLM_DP_SIZE"


def rewrite(arguments: Any, settings: Settings) -> tuple[Decision, list[Change]]:
    """Rewrite an ``EngineArgs``, or the Namespace of ``vllm serve``, in place where it assumes expert parallelism.

    Raises:
        LaunchError: the launch cannot become tensor parallel; the message names one that can.
        PatchError: no patch matches the model, so its weights could not be checked.
        ModelError: ``EP2TP_STRICT=1`` and the model's config cannot be read.
        SeamError: ``EP2TP_STRICT=1`` and this vLLM is not one that ep2tp knows.
    """
    from vllm.engine.arg_utils import EngineArgs

    values = vllm_arguments.given_values(arguments, EngineArgs)
    trigger = assumes_expert_parallelism(vllm_arguments.RULES, values)
    processes = int(os.environ.get(_PROCESS_PER_RANK, "1"))
    decision = decide(settings.mode, trigger, processes * _gpus(arguments))
    if not decision.rewrite:
        return decision, []
    # The patches' schema takes longest to import, and a launch that does not ask for expert parallelism needs none.
    from ep2tp.model.facts import is_moe
    from ep2tp.model.families import load_families
    from ep2tp.model.locate import facts_of

    config = read_model_config(arguments)
    if config is None:
        problem = f"the config.json of {arguments.model} cannot be read, so its sizes cannot be checked"
        if settings.strict:
            raise ModelError(f"{problem}; name a local folder or a hub id, or run the launch as given with EP2TP=off")
        return decision.leave_alone(problem, is_warning=True), []
    if not is_moe(config):
        return decision.leave_alone(f"{arguments.model} has no routed experts"), []
    if found := seam_problem(settings):
        return decision.leave_alone(found, is_warning=True), []
    if processes > 1:
        raise LaunchError(
            f"{_PROCESS_PER_RANK}={processes} starts one process per data-parallel rank; tensor parallelism is one "
            "launch over all GPUs. Unset it and start once with the product as --tensor-parallel-size, or set EP2TP=off"
        )
    facts = facts_of(config, arguments.model, load_families(settings.patches, settings.patch_path))
    changes = to_tensor_parallel(vllm_arguments.RULES, values, Limits(facts.heads, facts.kv_heads, facts.vocabulary))
    vllm_arguments.apply(changes, arguments, EngineArgs)
    guard.arm()
    let_ray_copy_our_variables()
    return decision, changes


def seam_problem(settings: Settings) -> str | None:
    """Why this vLLM is left alone, or None: its version is known (or the user insists), and every seam holds.

    Raises:
        SeamError: ``EP2TP_STRICT=1``, and there is a problem.
    """
    from vllm import __version__ as version

    insists = settings.mode is Mode.ON
    return engine_seams.problem("vLLM", version, seams.VERSIONS, seams.ALL, settings.strict, insists)


def let_ray_copy_our_variables() -> None:
    """vLLM's Ray executor passes on only the variables it is told of."""
    prefixes = [p for p in os.environ.get(_RAY_PREFIXES, "").split(",") if p]
    if "EP2TP" not in prefixes:
        os.environ[_RAY_PREFIXES] = ",".join([*prefixes, "EP2TP"])


def _gpus(arguments: Any) -> int:
    """GPUs of the whole job; a Namespace of an older vLLM may lack the newer sizes."""
    sizes = ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
    gpus = 1
    for size in sizes:
        gpus *= getattr(arguments, size, None) or 1
    return gpus
