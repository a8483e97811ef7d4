"""What ep2tp does in the processes that load a model: pads it, audits it, and keeps all-to-all buffers out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep2tp.engines.seams import Seam, Wrapper
from ep2tp.engines.sglang import seams
from ep2tp.errors import GuardError, SeamError
from ep2tp.model.same import is_same_model
from ep2tp.rewrite import guard
from ep2tp.settings import Mode, Settings

if TYPE_CHECKING:
    from ep2tp.engines.sglang.note import LaunchNote
    from ep2tp.model.sharding import ShardPlan

logger = logging.getLogger("sglang.ep2tp")

Wrapped = Callable[..., Any]
Positional = tuple[Any, ...]
Keywords = dict[str, Any]


@dataclass
class State:
    """What this process knows of its launch.

    Attributes:
        note: the launch, once it is known.
        joined: whether another process started the launch.
    """

    note: LaunchNote | None = None
    joined: bool = False

    @property
    def is_rewritten(self) -> bool:
        """Whether the launch was rewritten to tensor parallelism."""
        return self.note is not None and self.note["rewritten"]


state = State()


def join(note: LaunchNote) -> None:
    """Take part in a launch of another process, whatever the environment of this one says."""
    state.note, state.joined = note, True
    if note["rewritten"]:
        guard.arm()
    wrap_seams()


def wrappers() -> tuple[tuple[Seam, Wrapper], ...]:
    """The seams without which a launch is not rewritten, and what goes around them."""
    return (seams.MODEL, initialize_model), (seams.WEIGHTS, load_weights), (seams.LOADED, load_model)


def wrap_seams() -> None:
    """Wrap what only a process that loads a model reaches. Idempotent."""
    for seam, wrapper in wrappers():
        seam.wrap(wrapper)
    for buffer in seams.BUFFERS:
        buffer.wrap(refuse_buffer)


def initialize_model(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around ``_initialize_model(model_config, ...)``, which builds a model from its config."""
    model_config = args[0] if args else kwargs["model_config"]
    plan = _plan_of(model_config)
    if plan is not None:
        from ep2tp.engines.padding import grow

        grow(_configs(model_config), plan, "SGLang")
    return wrapped(*args, **kwargs)


def load_weights(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around ``DefaultModelLoader._get_all_weights(model_config, model)``, a generator."""
    from ep2tp.engines.rank_files import RankFiles
    from ep2tp.engines.sglang.ranks_loader import rank_weights
    from ep2tp.engines.weights import padded_weights

    model_config = args[0] if args else kwargs["model_config"]
    model = args[1] if len(args) > 1 else kwargs["model"]
    folder = Path(str(model_config.model_path))
    if RankFiles.are_in(folder):
        return rank_weights(folder, model)
    stream = wrapped(*args, **kwargs)
    plan = _plan_of(model_config)
    return stream if plan is None else padded_weights(stream, plan)


def load_model(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around ``ModelRunner.load_model()``."""
    from ep2tp.engines.sglang import experts

    result = wrapped(*args, **kwargs)
    if state.is_rewritten:
        experts.audit(instance.model)
        for path in guard.mapped_libraries():
            logger.info("ep2tp: %s is mapped, because SGLang imports it before plugins run; it gets no buffer", path)
    plan = _plan_of(instance.model_config)
    if state.note is not None and state.note["padding"] and not instance.is_draft_worker:
        _check_padded(instance.model_config, plan)
    if plan is not None:
        from ep2tp.engines.updates import pad_updates

        pad_updates(instance.model, plan)
    settings = Settings.from_environment()
    if settings.mode is not Mode.OFF and state.note is None and not instance.is_draft_worker:
        from ep2tp.engines.sglang import late

        late.report(instance, settings)
    if settings.mode is not Mode.OFF and settings.takes_kernel(state.is_rewritten):
        from ep2tp.engines.sglang import kernel

        if state.is_rewritten or experts.moe_layers(instance.model):
            kernel.install(instance.model, settings.kernel, instance.server_args)
    return result


def refuse_buffer(wrapped: Wrapped, instance: Any, args: Positional, kwargs: Keywords) -> Any:
    """Around each function that makes an all-to-all library's communication buffer.

    Raises:
        GuardError: the launch was rewritten to tensor parallelism.
    """
    if state.is_rewritten:
        raise GuardError(
            f"ep2tp: {wrapped.__name__} would make an all-to-all buffer, and this launch was rewritten to tensor "
            "parallelism; EP2TP=off runs the launch as given"
        )
    return wrapped(*args, **kwargs)


def _plan_of(model_config: Any) -> ShardPlan | None:
    """The plan of a model that this process loads: of the launch's model, or of a draft from the same checkpoint."""
    if state.note is None or not state.note["padding"]:
        return None
    if not is_same_model(str(model_config.model_path), state.note["model"]):
        return None
    from ep2tp.engines.padding import plan_of_note

    return plan_of_note(state.note["padding"], Settings.from_environment())


def _check_padded(model_config: Any, plan: ShardPlan | None) -> None:
    fields = plan.fields if plan is not None else {}
    for field, (before, _) in fields.items():
        if any(getattr(config, field, None) == before for config in _configs(model_config)):
            plan = None
    if plan is None:
        raise SeamError(f"{model_config.model_path} was to be padded and was not; run with EP2TP=off and report this")


def _configs(model_config: Any) -> list[Any]:
    return [model_config.hf_config, model_config.hf_text_config]
