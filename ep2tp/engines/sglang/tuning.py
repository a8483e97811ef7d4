"""SGLang's own Triton fused-MoE kernel, as ``ep2tp tune`` times it, and the files that tune it.

Stock SGLang reads them from ``configs/triton_X_Y_Z`` in the folder ``SGLANG_MOE_CONFIG_DIR``, which takes the place of
the folder that comes with SGLang; the entry with the nearest number of tokens counts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ep2tp.kernels.operands import ExpertWeights
    from ep2tp.kernels.search import EngineConfig

NAME = "SGLang"
VARIABLE = "SGLANG_MOE_CONFIG_DIR"


def file_path(down: ExpertWeights) -> Path:
    """Where SGLang looks for the file of a shape, below the folder."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config import get_config_file_name

    from ep2tp.kernels.timing import triton_version

    experts, _, size = down.values.shape
    name = str(get_config_file_name(experts, size, _dtype(down), _block(down), _is_per_row(down)))
    return Path("configs") / f"triton_{triton_version().replace('.', '_')}" / name


def default_config(down: ExpertWeights, top_k: int, tokens: int) -> EngineConfig:
    """What SGLang takes for a shape by itself, from its own files or by its heuristic."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config import try_get_optimal_moe_config

    publish_arguments()
    experts, hidden, size = down.values.shape
    shapes = (experts, 2 * size, hidden), (experts, hidden, size)
    found = try_get_optimal_moe_config(
        *shapes, top_k, _dtype(down), tokens, block_shape=_block(down), per_channel_quant=_is_per_row(down)
    )
    return dict(found)


def run(x: Any, gate_up: ExpertWeights, down: ExpertWeights, weights: Any, ids: Any, config: EngineConfig) -> Any:
    """One call of the kernel, activations quantised as SGLang does."""
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_utils import override_config
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    publish_arguments()
    count = down.values.shape[0]
    runner = MoeRunnerConfig(num_experts=count, num_local_experts=count, inplace=False)
    with override_config(dict(config)):
        return fused_experts(
            x,
            gate_up.values,
            down.values,
            StandardTopKOutput(weights, ids, weights),
            runner,
            use_fp8_w8a8=_dtype(down) is not None,
            per_channel_quant=_is_per_row(down),
            w1_scale=gate_up.scales,
            w2_scale=down.scales,
            block_shape=_block(down),
        )


@cache
def publish_arguments() -> None:
    """SGLang's kernels read settings of a launch; here there is none."""
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))


def _dtype(weights: ExpertWeights) -> str | None:
    return "fp8_w8a8" if weights.format.kind == "fp8" else None


def _block(weights: ExpertWeights) -> list[int] | None:
    return list(weights.format.block) if all(weights.format.block) else None


def _is_per_row(weights: ExpertWeights) -> bool:
    return weights.format.kind == "fp8" and weights.format.block == (1, 0)
