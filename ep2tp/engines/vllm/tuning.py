"""vLLM's own Triton fused-MoE kernel, as ``ep2tp tune`` times it, and the files that tune it.

Stock vLLM reads them from the folder ``VLLM_TUNED_CONFIG_FOLDER``; the entry with the nearest number of tokens counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ep2tp.kernels.operands import ExpertWeights
    from ep2tp.kernels.search import EngineConfig

NAME = "vLLM"
VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"


def file_path(down: ExpertWeights) -> Path:
    """Where vLLM looks for the file of a shape, below the folder."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    experts, _, size = down.values.shape
    return Path(get_config_file_name(experts, size, _dtype(down), _block(down)))


def default_config(down: ExpertWeights, top_k: int, tokens: int) -> EngineConfig:
    """What vLLM takes for a shape by itself, from its own files or by its heuristic."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    experts, hidden, size = down.values.shape
    shapes = (experts, 2 * size, hidden), (experts, hidden, size)
    return dict(try_get_optimal_moe_config(*shapes, top_k, _dtype(down), tokens, _block(down)))


def run(x: Any, gate_up: ExpertWeights, down: ExpertWeights, weights: Any, ids: Any, config: EngineConfig) -> Any:
    """One call of the kernel, activations quantised as vLLM does."""
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    quantised = None
    if gate_up.scales is not None:
        per_row = gate_up.format.block == (1, 0)
        quantised = fp8_w8a8_moe_quant_config(
            w1_scale=gate_up.scales,
            w2_scale=down.scales,
            block_shape=_block(down),
            per_act_token_quant=per_row,
            per_out_ch_quant=per_row,
        )
    with override_config(dict(config)):
        return fused_experts(x, gate_up.values, down.values, weights, ids, quant_config=quantised)


def _dtype(weights: ExpertWeights) -> str | None:
    return "fp8_w8a8" if weights.format.kind == "fp8" else None


def _block(weights: ExpertWeights) -> list[int] | None:
    return list(weights.format.block) if all(weights.format.block) else None
