"""Pads a checkpoint's MLP weights as they stream from its files into the model. Needs torch, knows no vLLM.

The model was built with the padded sizes, so the engine's own loader slices what it sees into whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ep2tp.errors import CheckpointError
from ep2tp.layout.shard import padded_shape
from ep2tp.model.formats import Fill
from ep2tp.model.sharding import ShardPlan, TensorPlan

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}


def padded_weights(weights: Iterable[tuple[str, torch.Tensor]], plan: ShardPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight, MLP weights at their padded size. Peak extra memory: one padded tensor.

    Args:
        weights: (name, tensor) as the engine reads them, names as in the checkpoint.
        plan: the plan by which the model was built.

    Raises:
        CheckpointError: a tensor does not fit the model's config, or a quantised weight came without its scales.
    """
    unscaled: dict[str, set[str]] = {}
    for name, tensor in weights:
        place = plan.tensor(name, tuple(tensor.shape), safetensors_dtype(tensor))
        if place is None:
            yield name, tensor
            continue
        _note_scales(unscaled, place)
        yield name, pad(tensor, place)
    missing = sorted(module for module, scales in unscaled.items() if scales)
    if missing:
        raise CheckpointError(
            f"{missing[0]}: no {' or '.join(sorted(unscaled[missing[0]]))} in the checkpoint "
            f"({len(missing)} such modules); its weights are quantised and mean nothing without scales"
        )


def pad(tensor: torch.Tensor, place: TensorPlan) -> torch.Tensor:
    """The tensor at its padded size; the tensor itself where nothing is padded.

    Works on the bytes, so that every dtype is copied bit for bit (``copy_`` would convert E8M0 exponents).
    """
    import torch

    if place.component.fill is Fill.SHAPE:
        return _padded_shape_values(tensor, place)
    if place.cut is None or not place.is_padded:
        return tensor
    cut = place.cut
    new_shape = padded_shape(tuple(tensor.shape), cut)
    if place.component.fill is Fill.GROUP_INDEX:
        index = torch.arange(new_shape[cut.axis], dtype=tensor.dtype, device=tensor.device)
        return index // place.format.col_block
    bits = _same_size_integer(tensor.dtype)
    element = int.from_bytes(place.fill(safetensors_dtype(tensor)), "little", signed=bits != torch.uint8)
    padded = torch.full(new_shape, element, dtype=bits, device=tensor.device)
    stored = tensor.view(bits)
    for run in cut.padded_runs():
        padded.narrow(cut.axis, run.target, run.count).copy_(stored.narrow(cut.axis, run.source, run.count))
    return padded.view(tensor.dtype)


def safetensors_dtype(tensor: torch.Tensor) -> str:
    """The safetensors name of a tensor's dtype; torch's own name for dtypes that no format stores."""
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _same_size_integer(dtype: torch.dtype) -> torch.dtype:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _padded_shape_values(tensor: torch.Tensor, place: TensorPlan) -> torch.Tensor:
    """``weight_shape`` of packed integers, two values, with the padded intermediate size."""
    values = tensor.clone()
    values[1 if place.matrix.role == "down" else 0] = place.split.padded
    return values


def _note_scales(unscaled: dict[str, set[str]], place: TensorPlan) -> None:
    required = place.format.required
    if not required:
        return
    module = place.matrix.module
    if place.component is place.format.components[0] or place.matrix.suffix in _WEIGHTS:
        unscaled.setdefault(module, set(required))
    elif place.matrix.suffix in required:
        unscaled[module] = set()


_WEIGHTS = (".weight", ".weight_packed", ".qweight", "_blocks", "")
