"""Grids, tile sizes and arguments of the kernel's launches."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from ep2tp.kernels.configs import KernelConfig, PassConfig
from ep2tp.kernels.device.combine import combine
from ep2tp.kernels.device.down_by_expert import down_by_expert
from ep2tp.kernels.device.down_by_token import down_by_token
from ep2tp.kernels.device.gate_up_by_expert import gate_up_by_expert
from ep2tp.kernels.device.gate_up_by_pair import gate_up_by_pair
from ep2tp.kernels.operands import UNIT, Activation, ExpertWeights, WeightFormat

_COMBINE_COLUMNS = 1024


@dataclass(frozen=True)
class Layer:
    """What stays the same from call to call; :func:`ep2tp.kernels.fused_moe.fused_moe` describes it."""

    gate_up: ExpertWeights
    down: ExpertWeights
    activation: Activation
    apply_router_weight_on_input: bool

    @property
    def experts(self) -> int:
        """E."""
        return int(self.gate_up.values.shape[0])

    @property
    def inner(self) -> int:
        """I, this rank's intermediate size."""
        return int(self.gate_up.values.shape[1]) // 2


def run_gate_up(layer: Layer, config: KernelConfig, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """First pass: ``[pairs, I]`` in x's dtype. Rows of pairs whose expert is unknown are not written."""
    tokens, top_k = topk_ids.shape
    pairs, hidden = tokens * top_k, x.shape[1]
    inner = torch.empty((pairs, layer.inner), dtype=x.dtype, device=x.device)
    tile, weights = config.gate_up, layer.gate_up
    shared = {
        "EXPERTS": layer.experts, "K": hidden, "I": layer.inner, "TOP_K": top_k, **_format(weights, config),
        "CLAMPED": layer.activation is not Activation.SILU, "INTERLEAVED": layer.activation.interleaved,
        "WEIGHT_INPUT": layer.apply_router_weight_on_input, "ROWS": tile.rows, "STAGES": tile.stages,
        "OVERLAP": config.overlap, **_compiled(tile),
    }  # fmt: skip
    operands = (x, *_tensors(weights), topk_weights, topk_ids, inner, x.stride(0))
    tiles = triton.cdiv(layer.inner, tile.rows)
    if config.by_pair:
        unit = unit_of(weights.format, hidden)
        gate_up_by_pair[(pairs, tiles)](*operands, **shared, UNIT=unit, COLUMNS=_columns(tile, unit, hidden))
    else:
        by_expert = {**_by_expert(layer, config, pairs), **_products(config, tile, weights.format, hidden)}
        gate_up_by_expert[(min(pairs, layer.experts), tiles)](*operands, pairs, **shared, **by_expert)
    return inner


def run_down(
    layer: Layer, config: KernelConfig, inner: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor
) -> None:
    """Second pass and, where its programs are experts', the sum: writes all of ``out``."""
    tokens, top_k = topk_ids.shape
    pairs, hidden = tokens * top_k, out.shape[1]
    tile, weights = config.down, layer.down
    shared = {
        "EXPERTS": layer.experts, "K": hidden, "I": layer.inner, **_format(weights, config),
        "WEIGHT_INPUT": layer.apply_router_weight_on_input, "ROWS": tile.rows, "OVERLAP": config.overlap,
        **_compiled(tile), **_overlapping(config),
    }  # fmt: skip
    operands = (inner, *_tensors(weights), topk_weights, topk_ids)
    tiles = triton.cdiv(hidden, tile.rows)
    if config.by_token:
        unit = unit_of(weights.format, layer.inner)
        columns = _columns(tile, unit, top_k * layer.inner)
        down_by_token[(tokens, tiles)](*operands, out, **shared, TOP_K=top_k, UNIT=unit, COLUMNS=columns)
        return
    parts = torch.empty((pairs, hidden), dtype=torch.float32, device=out.device)
    by_expert = {**_by_expert(layer, config, pairs), **_products(config, tile, weights.format, layer.inner)}
    down_by_expert[(min(pairs, layer.experts), triton.cdiv(tiles, tile.tiles))](
        *operands, parts, pairs, **shared, **by_expert, STAGES=tile.stages, TILES=tile.tiles
    )
    combine[(tokens, triton.cdiv(hidden, _COMBINE_COLUMNS))](
        parts, topk_ids, out, EXPERTS=layer.experts, K=hidden, TOP_K=top_k, COLUMNS=_COMBINE_COLUMNS,
        OVERLAP=config.overlap, **_overlapping(config),
    )  # fmt: skip


def unit_of(weight_format: WeightFormat, columns: int) -> int:
    """Values that one thread loads at a time: 16 bytes of them, or as many as share a scale and divide the columns."""
    unit = {"bf16": 8, "fp8": 16}.get(weight_format.kind, 32)
    group = weight_format.block[1] if weight_format.kind != "bf16" else 0
    return max(8, gcd(unit, columns, group))


def _columns(tile: PassConfig, unit: int, columns: int) -> int:
    """Columns in a tile: no more than there are, and at least one unit."""
    return int(max(unit, min(tile.columns, triton.next_power_of_2(columns))))


def _products(config: KernelConfig, tile: PassConfig, weight_format: WeightFormat, columns: int) -> dict[str, int]:
    """Columns of a tile on tensor cores, in whole groups of the 4-bit formats; slices that each have one scale; inputs.

    With inputs of 8 bits, all of a tile's columns have one scale, and 32 of them are the least that is multiplied.
    """
    is_packed = weight_format.values_per_byte == 2
    block = weight_format.block[1] if weight_format.kind != "bf16" else 0
    size = int(max(32, block) if is_packed else UNIT)
    size = max(size, min(tile.columns, triton.next_power_of_2(columns)))
    one_scale = min(size, block or size)
    slices, input_bits = tile.slices, 16
    if weight_format.kind == "fp8" and tile.input_bits == 8 and one_scale >= 32 and not config.fp8_bits:
        size, slices, input_bits = one_scale, 1, 8
    elif is_packed:
        slices = 1
    elif slices > 1 and block:
        slices = max(slices, size // block)
    return {"COLUMNS": size, "SLICES": min(slices, size // UNIT), "INPUT_BITS": input_bits}


def _by_expert(layer: Layer, config: KernelConfig, pairs: int) -> dict[str, Any]:
    return {
        "PAIRS": config.pairs,
        "ALL_PAIRS": max(16, triton.next_power_of_2(pairs)),
        "FIND": pairs <= layer.experts,
    }


def _format(weights: ExpertWeights, config: KernelConfig) -> dict[str, Any]:
    stored = weights.format
    rows, columns = (0, 0) if stored.kind == "bf16" else stored.block
    return {
        "KIND": stored.kind,
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
        "PACK": stored.values_per_byte,
        "BITS": config.fp8_bits,
    }


def _tensors(weights: ExpertWeights) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Values, scales, global scales and bias as kernels take them: bytes, unless a number is of 16 or 32 bits."""
    values, scales = weights.values, weights.scales
    if weights.format.kind != "bf16":
        values = values.view(torch.uint8)
    if scales is None:
        scales = values
    elif scales.element_size() == 1:
        scales = scales.view(torch.uint8)
    return values, scales, weights.global_scales, weights.bias


def _compiled(tile: PassConfig) -> dict[str, int]:
    return {"num_warps": tile.warps, **({"maxnreg": tile.registers} if tile.registers else {})}


def _overlapping(config: KernelConfig) -> dict[str, Any]:
    return {"launch_pdl": True} if config.overlap else {}
