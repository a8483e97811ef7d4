"""Weights that a running engine is given in place: padded like a checkpoint's, or refused. Needs torch, no engine.

Updates reach a loaded model in many ways (from a trainer, another checkpoint, a caller's iterator), and all of them end
in its ``load_weights``. It is replaced on the object of a padded model: what the engine would slice wrongly, without a
word, never reaches its loaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

from ep2tp.engines.weights import pad, safetensors_dtype
from ep2tp.errors import CheckpointError, LaunchError
from ep2tp.model.sharding import ShardPlan

if TYPE_CHECKING:
    import torch

_MARK = "_ep2tp_pads_updates"


def pad_updates(model: Any, plan: ShardPlan) -> None:
    """Make the ``load_weights`` of a loaded model take tensors of the checkpoint's sizes. Idempotent.

    Args:
        model: the engine's ``torch.nn.Module``.
        plan: the plan by which it was built, which pads.
    """
    engine_load = model.load_weights
    if hasattr(engine_load, _MARK):
        return

    @wraps(engine_load)
    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        return engine_load(padded_updates(weights, plan), *args, **kwargs)

    setattr(load_weights, _MARK, True)
    model.load_weights = load_weights


def padded_updates(weights: Iterable[tuple[str, torch.Tensor]], plan: ShardPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of an update, which may be a part of the model, at the size that the model was built with.

    Tensors that are padded already pass: ep2tp's own stream, when an engine reads its checkpoint again.

    Raises:
        LaunchError: a tensor is neither of the checkpoint's size nor of the padded one, has a name of an expert that
            the patch does not know, or is no plain tensor.
    """
    for name, tensor in weights:
        yield name, _padded(name, tensor, plan)


def _padded(name: str, tensor: torch.Tensor, plan: ShardPlan) -> torch.Tensor:
    shape, dtype = tuple(tensor.shape), safetensors_dtype(tensor)
    if plan.is_applied_to(name, shape, dtype):
        return tensor
    try:
        place = plan.tensor(name, shape, dtype)
    except CheckpointError as error:
        raise LaunchError(f"{error}; {_advice(plan)}") from None
    if place is None:
        return tensor
    if place.is_padded and not _is_plain(tensor):
        raise LaunchError(f"{name}: a {type(tensor).__name__} that holds no values cannot be padded; {_advice(plan)}")
    return pad(tensor, place)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its values; some transfers hand over stand-ins that record what is sliced of them."""
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta


def _advice(plan: ShardPlan) -> str:
    sizes = ", ".join(f"{field} {before} -> {after}" for field, (before, after) in plan.fields.items())
    return (
        f"ep2tp padded this model ({sizes}), so updates in place have to be whole tensors under the checkpoint's own "
        "names. Send those, or start with a tensor-parallel size that needs no padding"
    )
