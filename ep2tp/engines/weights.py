"""Pads a checkpoint's MLP weights as they stream from its files into the model. Needs torch, knows no vLLM.

The model was built with the padded sizes, so the engine's own loader slices what it sees into whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ep2tp.errors import CheckpointError
from ep2tp.layout.shard import padded_shape
from ep2tp.model.formats import WEIGHT_SUFFIXES, Fill, Format
from ep2tp.model.sharding import ShardPlan, TensorPlan

if TYPE_CHECKING:
    import torch

    from ep2tp.model.families import ClassName

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
        CheckpointError: a tensor does not fit the model's config, a quantised weight came without its scales, or none
            came that the plan pads.
    """
    modules: dict[str, tuple[Format, set[str]]] = {}
    found: set[ClassName] = set()
    for name, tensor in weights:
        place = plan.tensor(name, tuple(tensor.shape), safetensors_dtype(tensor))
        if place is None:
            yield name, tensor
            continue
        found.add(place.matrix.class_name)
        if place.format.required:
            modules.setdefault(place.matrix.module, (place.format, set()))[1].add(place.matrix.suffix)
        yield name, pad(tensor, place)
    plan.check_found(found)
    _check_scales(modules)


def pad(tensor: torch.Tensor, place: TensorPlan) -> torch.Tensor:
    """The tensor at its padded size; the tensor itself where nothing is padded.

    Works on the bytes, so that every dtype is copied bit for bit (``copy_`` would convert E8M0 exponents).
    """
    import torch

    if place.component.fill is Fill.SHAPE and not place.split.is_exact:
        return _padded_shape_values(tensor, place)
    cut = place.cut
    if cut is None or not place.is_padded:
        return tensor
    if place.component.fill is Fill.GROUP_INDEX:
        return _padded_group_index(tensor, place, cut.padded)
    new_shape = padded_shape(tuple(tensor.shape), cut)
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


def _padded_group_index(tensor: torch.Tensor, place: TensorPlan, size: int) -> torch.Tensor:
    import torch

    group = place.format.component(".scales").cols.per  # type: ignore[union-attr]
    index = torch.arange(size, dtype=tensor.dtype, device=tensor.device) // group
    if not torch.equal(index[: len(tensor)], tensor):
        raise CheckpointError(
            f"{place.matrix.module}{place.matrix.suffix}: columns are not in groups of {group} one after the other; a "
            "slice would cut groups although quantization_config does not say desc_act=true"
        )
    return index


def _check_scales(modules: Mapping[str, tuple[Format, set[str]]]) -> None:
    """Check that each module that has quantised weights has what they need."""
    missing = {
        module: names
        for module, (stored, found) in modules.items()
        for names in stored.required
        if found & WEIGHT_SUFFIXES and not found.intersection(names)
    }
    if missing:
        module = min(missing)
        raise CheckpointError(
            f"{module}: no {' or '.join(missing[module])} in the checkpoint ({len(missing)} such modules); its weights "
            "are quantised and mean nothing without scales"
        )
