"""The fused MoE layer of one tensor-parallel rank: gate, up, activation, down and the weighted sum over experts."""

from __future__ import annotations

from torch import Tensor

from ep2tp.kernels.configs import KernelConfig
from ep2tp.kernels.operands import Activation, ExpertWeights, check_operands


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
    """Sum over each token's experts of ``weight * down(act(gate_up(x)))``, ``[M, K]`` in x's dtype."""
    check_operands(x, gate_up, down, topk_weights, topk_ids, out)
    raise NotImplementedError
