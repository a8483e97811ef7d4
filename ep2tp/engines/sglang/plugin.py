"""SGLang's entry point (group ``sglang.srt.plugins``). Runs in every process of a launch, and imports nothing heavy.

In the process that the user starts, one seam rewrites the launch before SGLang resolves it; what happens in the workers
is in :mod:`ep2tp.engines.sglang.worker`. SGLang logs what goes wrong in a plugin and runs on, so nothing here counts on
SGLang to stop: see :mod:`ep2tp.engines.sglang.note`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import wrapt

from ep2tp.engines.report import log_launch
from ep2tp.engines.sglang import seams, worker
from ep2tp.engines.sglang.note import LaunchNote, attach, find, mark_seen, this_process
from ep2tp.errors import SettingError
from ep2tp.rewrite import guard
from ep2tp.settings import Mode, Settings

logger = logging.getLogger("sglang.ep2tp")

_NO_MODEL = ("none", "dummy")  # SGLang's names for a launch without a model


def register() -> None:
    """Wrap the seams. Idempotent; ``EP2TP=off`` wraps only what reads rank files.

    Raises:
        SystemExit: an ``EP2TP*`` variable has an unknown value; SGLang would log any other error, and run on.
    """
    try:
        settings = Settings.from_environment()
    except SettingError as error:
        raise SystemExit(f"ep2tp: {error}") from None
    if settings.mode is Mode.OFF:
        seams.WEIGHTS.wrap(worker.load_weights)
        return
    guard.arm_if_inherited()
    seams.resolve().wrap(resolve)
    wrapt.register_post_import_hook(_register_resolution_hook, seams.A2A.module)
    worker.wrap_seams()


def resolve(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the step that resolves a ``ServerArgs``, before which no worker exists. Resolving twice is a no-op."""
    settings = Settings.from_environment()
    is_resolved = find(instance) is not None or getattr(instance, "_resolution_finished", False)
    has_model = str(instance.model_path).lower() not in _NO_MODEL
    if worker.state.joined or is_resolved or not has_model:
        return wrapped(*args, **kwargs)
    worker.state.note = None  # an earlier launch's
    if settings.mode is Mode.OFF:
        guard.disarm()
        return wrapped(*args, **kwargs)
    from ep2tp.engines.padding import note_of
    from ep2tp.engines.sglang import launch, padding

    decision, changes = launch.rewrite(instance, settings)
    if not changes:
        guard.disarm()  # an earlier launch of this process was rewritten, this one is not
    note = worker.state.note = LaunchNote(rewritten=bool(changes), model="", padding=None, launcher=this_process())
    result = wrapped(*args, **kwargs)
    if changes:
        launch.check_resolved(instance)
    plan = padding.plan(instance, settings, bool(changes))
    if plan is not None and plan.is_padded:
        view = launch.resolved(instance)
        note.update(model=str(view.model_path), padding=note_of(plan, view.tp_size))
    mark_seen(instance)
    if note["rewritten"] or note["padding"]:
        attach(instance, note)
    if instance.node_rank == 0 and (plan is not None or decision.asked):
        with _configured_log(instance.log_level):
            log_launch(logger, decision, changes, plan, settings)
    return result


def _register_resolution_hook(module: Any) -> None:
    """Use SGLang's own way (since 0.5.20) into its resolution, after the model's own defaults."""

    def handle_a2a_moe(arguments: Any, previous: Callable[[Any], None]) -> None:
        if worker.state.is_rewritten:
            from ep2tp.engines.sglang import launch

            launch.keep_tensor_parallel(arguments)
        previous(arguments)

    module.register_resolution_hook("handle_a2a_moe")(handle_a2a_moe)


@contextmanager
def _configured_log(level: str) -> Iterator[None]:
    """A log for what is written before SGLang configures its own, as ``sglang serve`` does after resolving."""
    if logging.getLogger().hasHandlers():
        yield
        return
    handler, before = logging.StreamHandler(), logger.level
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
