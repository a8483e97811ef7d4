"""One SGLang launch: decides whether it is rewritten, and rewrites its arguments before SGLang resolves them."""

from __future__ import annotations

import json
from typing import Any

from ep2tp.engines import seams as engine_seams
from ep2tp.engines.decision import Decision
from ep2tp.engines.launch import Launch, changes_of
from ep2tp.engines.model_config import read_model_config, read_quantization_file
from ep2tp.engines.sglang import arguments as sglang_arguments
from ep2tp.engines.sglang import seams, worker
from ep2tp.errors import LaunchError, SeamError
from ep2tp.rewrite import guard
from ep2tp.rewrite.parallel_plan import Change, size_of
from ep2tp.settings import Mode, Settings


def rewrite(arguments: Any, settings: Settings) -> tuple[Decision, list[Change]]:
    """Rewrite an unresolved ``ServerArgs`` in place where it assumes expert parallelism.

    Raises:
        LaunchError: the launch cannot become tensor parallel; the message names one that can.
        PatchError, ModelError, SeamError: see :func:`ep2tp.engines.launch.changes_of`.
    """
    values = sglang_arguments.given_values(arguments)
    if "enable_prefill_cp" in values:
        values = sglang_arguments.without_harmless_prefill_cp(values, read_config(arguments))
    rules = sglang_arguments.RULES
    launch = Launch(
        rules=rules,
        values=values,
        model=str(arguments.model_path),
        gpus=rules.gpus(values) * size_of(rules.pipeline_parallel, values),
        read_config=lambda: read_config(arguments),
        seam_problem=seam_problem,
        devices=devices(arguments, rules.gpus(values), size_of(rules.pipeline_parallel, values)),
    )
    decision, changes = changes_of(launch, settings)
    if decision.rewrite:
        sglang_arguments.apply(changes, arguments)
        guard.arm()
    return decision, changes


def devices(arguments: Any, ranks: int, stages: int) -> tuple[int, ...]:
    """The GPUs of a launch on one node that does not take the first ones (``--base-gpu-id``, ``--gpu-id-step``).

    Args:
        arguments: a ``ServerArgs``.
        ranks: of a pipeline stage.
        stages: of the pipeline.

    Returns:
        Their places among those that the process may use; empty where they are the first ones, or on several nodes.
    """
    base, step = arguments.base_gpu_id, arguments.gpu_id_step
    if (base, step) == (0, 1) or arguments.nnodes > 1:
        return ()
    return tuple(dict.fromkeys(base + stage * ranks + rank * step for stage in range(stages) for rank in range(ranks)))


def read_config(arguments: Any) -> dict[str, Any] | None:
    """The model's config.json with ``--json-model-override-args``; None where it cannot be read."""
    from ep2tp.model.facts import is_moe

    overrides = json.loads(arguments.json_model_override_args or "{}")
    config = read_model_config(str(arguments.model_path), arguments.revision, overrides=overrides)
    if config is not None and is_moe(config) and "quantization_config" not in config:
        quantization = read_quantization_file(str(arguments.model_path), arguments.revision)
        config |= {"quantization_config": quantization} if quantization else {}
    return config


def seam_problem(settings: Settings) -> str | None:
    """Why this SGLang is left alone, or None: its version is known (or the user insists), and every seam took.

    Raises:
        SeamError: ``EP2TP_STRICT=1``, and there is a problem.
    """
    version, insists = seams.version(), settings.mode is Mode.ON
    found = engine_seams.problem("SGLang", version, seams.VERSIONS, seams.required(), settings.strict, insists, parts=3)
    if found is None and (missing := [seam for seam, wrapper in worker.wrappers() if not seam.is_wrapped(wrapper)]):
        found = f"ep2tp's wrapper of {', '.join(seam.attribute for seam in missing)} did not take"
        if settings.strict:
            raise SeamError(found)
    return found


def check_resolved(arguments: Any) -> None:
    """Check that SGLang resolved a rewritten launch to tensor parallelism.

    Raises:
        LaunchError: one of the model's own defaults turned expert parallelism on again.
    """
    view = resolved(arguments)
    widths = {name: getattr(view, name, 1) for name in ("ep_size", "moe_dp_size", "attn_dp_size", "dwdp_size")}
    found = [f"{name}={value}" for name, value in widths.items() if value not in (None, 1)]
    if view.moe_a2a_backend not in ("none", None):
        found.append(f"moe_a2a_backend={view.moe_a2a_backend}")
    if found:
        raise LaunchError(
            f"SGLang {seams.version()} resolved this launch to {', '.join(found)} although it was rewritten to tensor "
            "parallelism: this model's own settings ask for it. EP2TP=off runs it as given"
        )


def keep_tensor_parallel(arguments: Any) -> None:
    """Take back, within a rewritten launch's resolution, the expert parallelism of a model's own defaults."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    view = resolved(arguments)
    neutral = {"moe_a2a_backend": "none", "ep_size": 1}
    undone = {name: value for name, value in neutral.items() if getattr(view, name) != value}
    if undone:
        declare_resolution(arguments, "ep2tp", **undone)


def resolved(arguments: Any) -> Any:
    """What a ``ServerArgs`` was resolved to so far; has the same fields."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(arguments)
