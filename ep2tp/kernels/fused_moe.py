"""The fused MoE layer of one tensor-parallel rank: gate, up, activation, down and the weighted sum over experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ep2tp.kernels.configs import KernelConfig, default
from ep2tp.kernels.launch import Layer, run_down, run_gate_up
from ep2tp.kernels.operands import Activation, ExpertWeights, check_operands
from ep2tp.kernels.operator import traced_fused_moe

MAX_PAIRS = 1024
"""A program compares the ids of all pairs of a launch, so that more tokens are taken in several launches."""


def fused_moe(
    x: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: Activation = Activation.SILU,
    apply_router_weight_on_input: bool = False,
    out: Tensor | None = None,
    config: KernelConfig | None = None,
) -> Tensor:
    """Sum over each token's experts of ``weight * down(act(gate_up(x)))``.

    Weights are dequantised in registers and multiplied with x as it is, unless ``config`` has ``input_bits`` of 8; sums
    are float32; the activation's result is rounded to x's dtype. The result is the same each time: no atomics.

    Args:
        x: BF16 or FP16 ``[M, K]``; rows may be strided.
        gate_up: ``[E, 2I, K]``.
        down: ``[E, K, I]``, this rank's slice: the caller sums over ranks.
        topk_weights: float32 ``[M, top_k]``.
        topk_ids: int32 or int64 ``[M, top_k]``. Ids outside ``[0, E)`` add nothing; an expert may come twice.
        activation: what joins gate and up.
        apply_router_weight_on_input: multiply gate's and up's products with the router's weight, not down's.
        out: where to write, like x and contiguous; made if absent. It must not share memory with x.
        config: tiles; by default :func:`ep2tp.kernels.configs.default`.

    Returns:
        ``[M, K]`` in x's dtype.

    Raises:
        OperandError: the message names the operand, what it is and what it should be.
    """
    if torch.compiler.is_compiling():
        operands = (x, gate_up, down, topk_weights, topk_ids)
        result = traced_fused_moe(*operands, activation, apply_router_weight_on_input, config)
        return result if out is None else out.copy_(result)
    check_operands(x, gate_up, down, topk_weights, topk_ids, out)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    tokens, top_k = topk_ids.shape
    if tokens == 0:
        return out
    if top_k == 0:
        return out.zero_()
    layer = Layer(gate_up, down, activation, apply_router_weight_on_input)
    step = max(1, MAX_PAIRS // top_k)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        chosen = config or default(min(step, tokens), _capability(x.device))
        inner = run_gate_up(layer, chosen, x[part], topk_weights[part], topk_ids[part])
        run_down(layer, chosen, inner, topk_weights[part], topk_ids[part], out[part])
    return out


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
