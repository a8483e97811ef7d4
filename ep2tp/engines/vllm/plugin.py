"""vLLM's entry point (group ``vllm.general_plugins``). Runs in every process of a launch, and imports nothing heavy.

In the process that the user starts, two seams rewrite the launch; in the workers, one pads the weights, and one puts
ep2tp's kernel on the loaded model. Everything that needs vLLM or torch is imported when a seam is reached, and then
vLLM has long imported both.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ep2tp.engines.report import log_launch
from ep2tp.engines.vllm import load_format, seams
from ep2tp.rewrite import guard
from ep2tp.settings import Mode, Settings

if TYPE_CHECKING:
    from ep2tp.engines.decision import Decision
    from ep2tp.rewrite.parallel_plan import Change

logger = logging.getLogger("vllm.ep2tp")  # below "vllm", so that it follows vLLM's own log settings

Wrapped = Callable[..., Any]
Positional = tuple[Any, ...]
Keywords = dict[str, Any]

_REWRITTEN = "_ep2tp_rewritten"  # on the EngineArgs of a launch that was rewritten

# What `vllm serve` rewrote in this process, for the report that is written once its engine config exists.
_served: list[tuple[Decision, list[Change]]] = []


def register() -> None:
    """Wrap the seams, and add the load format of offline rank files. Idempotent; ``EP2TP=off`` adds the format only.

    Raises:
        SettingError: an ``EP2TP*`` variable has an unknown value.
    """
    load_format.register()
    settings = Settings.from_environment()
    if settings.mode is Mode.OFF:
        return
    guard.arm_if_inherited()
    seams.SERVE.wrap(_serve)
    seams.ENGINE_CONFIG.wrap(_create_engine_config)
    seams.WEIGHTS.wrap(pad_weights)
    seams.LOADED.wrap(load_model)


def _serve(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around ``ServeSubcommand.cmd(args)``, which starts an API server per data-parallel rank."""
    from ep2tp.engines.vllm import launch

    settings = Settings.from_environment()
    if settings.mode is Mode.OFF:
        return wrapped(*args, **kwargs)
    namespace = args[0] if args else kwargs["args"]
    if getattr(namespace, "model_tag", None) is not None:
        namespace.model = namespace.model_tag
    _served.append(launch.rewrite(namespace, settings))
    return wrapped(*args, **kwargs)


def _create_engine_config(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around ``EngineArgs.create_engine_config``, before which no worker exists."""
    settings = Settings.from_environment()
    if settings.mode is Mode.OFF:
        guard.disarm()  # an earlier launch of this process may have been rewritten
        return wrapped(*args, **kwargs)
    from ep2tp.engines.vllm import launch

    decision, changes = launch.rewrite(instance, settings)
    if _served:
        decision, changes = _served.pop()
    if decision.rewrite:
        setattr(instance, _REWRITTEN, True)
    is_rewritten = getattr(instance, _REWRITTEN, False)  # also by an earlier call: they ask for nothing any more
    if is_rewritten:
        guard.arm()
    elif not _is_api_server_child(instance):
        guard.disarm()  # an earlier launch of this process was rewritten, this one is not
    vllm_config = wrapped(*args, **kwargs)
    plan = None
    if vllm_config.model_config.is_moe:
        from ep2tp.engines.vllm import padding

        plan = padding.pad(vllm_config, instance, settings, is_rewritten)
    if _is_reporter(instance) and (plan is not None or decision.asked):
        log_launch(logger, decision, changes, plan, settings)
    return vllm_config


def pad_weights(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around ``DefaultModelLoader.get_all_weights(model_config, model)``, a generator."""
    from ep2tp.engines.vllm import experts, padding
    from ep2tp.engines.weights import padded_weights

    stream = wrapped(*args, **kwargs)
    model_config = args[0] if args else kwargs["model_config"]
    model = args[1] if len(args) > 1 else kwargs["model"]
    if guard.is_armed():
        experts.audit(model)
        for path in guard.mapped_libraries():
            logger.warning("ep2tp: %s is mapped into this process although the launch needs no all-to-all", path)
    plan = padding.plan_of(model_config, Settings.from_environment())
    return stream if plan is None else padded_weights(stream, plan)


def load_model(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around ``BaseModelLoader.load_model(vllm_config, model_config, ...)``, of a model and of a draft.

    Their weights are as their kernels take them by then.
    """
    from ep2tp.engines.vllm import padding

    model = wrapped(*args, **kwargs)
    settings = Settings.from_environment()
    model_config = args[1] if len(args) > 1 else kwargs["model_config"]
    if (plan := padding.plan_of(model_config, settings)) is not None:
        from ep2tp.engines.updates import pad_updates

        pad_updates(model, plan)
    if settings.takes_kernel(guard.is_armed()) and model_config.is_moe:
        from ep2tp.engines.vllm import kernel

        kernel.install(model, settings.kernel)
    return model


def _is_reporter(engine_args: Any) -> bool:
    """Whether this process speaks for the launch: nodes, API servers and an external launcher make several."""
    if engine_args.node_rank > 0:
        return False
    if engine_args.distributed_executor_backend == "external_launcher":
        return os.environ.get("RANK", "0") == "0"
    return not _is_api_server_child(engine_args)


def _is_api_server_child(engine_args: Any) -> bool:
    """Whether this is one of several API servers, whose parent made the launch (and has rank -1)."""
    servers, rank = getattr(engine_args, "_api_process_count", 1), getattr(engine_args, "_api_process_rank", 0)
    return servers > 1 and rank >= 0
