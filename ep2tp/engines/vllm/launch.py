"""One vLLM launch: decides whether it is rewritten, and rewrites its arguments in place."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from ep2tp.engines import seams as engine_seams
from ep2tp.engines.decision import Decision
from ep2tp.engines.launch import Launch, changes_of
from ep2tp.engines.vllm import arguments as vllm_arguments
from ep2tp.engines.vllm import seams
from ep2tp.engines.vllm.model_config import read_model_config
from ep2tp.rewrite import guard
from ep2tp.rewrite.parallel_plan import Change
from ep2tp.settings import Mode, Settings

_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


def rewrite(arguments: Any, settings: Settings) -> tuple[Decision, list[Change]]:
    """Rewrite an ``EngineArgs``, or the Namespace of ``vllm serve``, in place where it assumes expert parallelism.

    Raises:
        LaunchError: the launch cannot become tensor parallel; the message names one that can.
        PatchError, ModelError, SeamError: see :func:`ep2tp.engines.launch.changes_of`.
    """
    from vllm.engine.arg_utils import EngineArgs

    processes = int(os.environ.get(vllm_arguments.PROCESS_PER_RANK, "1"))
    launch = Launch(
        rules=vllm_arguments.RULES,
        values=vllm_arguments.given_values(arguments, EngineArgs),
        model=str(arguments.model),
        gpus=processes * _gpus(arguments),
        read_config=cache(lambda: read_model_config(arguments)),  # the hub is asked each time
        seam_problem=seam_problem,
        devices=tuple(getattr(arguments, "device_ids", None) or ()),
        is_one_process_of_many=processes > 1,
    )
    decision, changes = changes_of(launch, settings)
    if not decision.rewrite:
        return decision, []
    if processes > 1:
        raise vllm_arguments.process_per_rank(f"{vllm_arguments.PROCESS_PER_RANK}={processes}")
    mode, ranks = getattr(arguments, "mm_encoder_tp_mode", None), launch.rules.gpus(launch.values)
    changes += vllm_arguments.encoder_changes(mode, launch.read_config(), ranks)
    changes += vllm_arguments.draft_changes(getattr(arguments, vllm_arguments.DRAFT, None), changes)
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
    return engine_seams.problem("vLLM", version, seams.VERSIONS, seams.REQUIRED, settings.strict, insists)


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
