"""The fused MoE layer in plain torch, one expert at a time: what the kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ep2tp.kernels.operands import Activation, ExpertWeights

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""OCP Microscaling (MX) 1.0, table 5: magnitudes by their three bits."""


def dequantise(weights: ExpertWeights, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[E, rows, columns]`` of ``dtype``; exact in float32 and float64 for all formats but a rounded product."""
    values = _values(weights, dtype)
    if weights.scales is None:
        return values
    scales = _scales(weights, dtype)
    for axis, block in ((1, weights.format.block[0]), (2, weights.format.block[1])):
        if block:
            scales = scales.repeat_interleave(block, dim=axis).narrow(axis, 0, values.shape[axis])
    return values * scales


def _values(weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
    kind, stored = weights.format.kind, weights.values
    if kind == "bf16":
        return stored.to(dtype)
    if kind == "fp8":
        return stored.view(torch.float8_e4m3fn).to(dtype)
    packed = stored.view(torch.uint8)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(2).int()
    if kind == "int4":
        return (nibbles - 8).to(dtype)
    magnitudes = torch.tensor(_E2M1, dtype=dtype, device=stored.device)
    return magnitudes[nibbles & 7] * torch.where(nibbles < 8, 1, -1)


def _scales(weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
    assert weights.scales is not None
    kind, scales = weights.format.kind, weights.scales
    if kind == "mxfp4":
        exponents = scales.view(torch.uint8).to(dtype)
        return torch.where(exponents == 255, torch.nan, torch.exp2(exponents - 127))
    if kind == "nvfp4":
        assert weights.global_scales is not None
        return scales.view(torch.float8_e4m3fn).to(dtype) * weights.global_scales.to(dtype)[:, None, None]
    return scales.to(dtype)


def activate(gate_up: Tensor, activation: Activation) -> Tensor:
    """Join ``[..., 2I]`` rows of gate and up to ``[..., I]``; :class:`Activation` has the formulas."""
    if activation.interleaved:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    if activation is Activation.SILU:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def fused_moe_reference(
    x: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Activation = Activation.SILU,
    *,
    apply_router_weight_on_input: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each token's weighted sum of its experts, ``[M, K]`` of ``dtype``, with no rounding in between.

    Expert ids outside ``[0, E)`` add nothing. Only the matrices of experts that are hit are dequantised, one at a time.
    """
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for expert in range(gate_up.values.shape[0]):
        tokens, slots = torch.where(topk_ids == expert)
        if tokens.numel() == 0:
            continue
        weight = topk_weights[tokens, slots].to(dtype)[:, None]
        rows = x[tokens].to(dtype) * (weight if apply_router_weight_on_input else 1)
        inner = activate(_linear(rows, _expert(gate_up, expert)), activation)
        result = _linear(inner, _expert(down, expert))
        out.index_add_(0, tokens, result if apply_router_weight_on_input else result * weight)
    return out


def _expert(weights: ExpertWeights, expert: int) -> ExpertWeights:
    def one(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[expert : expert + 1]

    return ExpertWeights(
        weights.values[expert : expert + 1],
        one(weights.scales),
        weights.format,
        one(weights.bias),
        one(weights.global_scales),
    )


def _linear(rows: Tensor, weights: ExpertWeights) -> Tensor:
    result = rows @ dequantise(weights, rows.dtype)[0].T
    return result if weights.bias is None else result + weights.bias[0].to(rows.dtype)
