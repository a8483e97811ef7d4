"""The table of vLLM's seams. ``docs/seams.md`` says why each of them is where it is."""

from __future__ import annotations

from ep2tp.engines.seams import Seam

VERSIONS = ("0.25.1", "0.28.0", "0.32.0", "0.33.0")

SERVE = Seam(
    "vllm.entrypoints.cli.serve",
    "ServeSubcommand.cmd",
    ("args",),
    "rewrites the arguments of `vllm serve` before it counts API servers by data-parallel ranks",
    VERSIONS,
)
ENGINE_CONFIG = Seam(
    "vllm.engine.arg_utils",
    "EngineArgs.create_engine_config",
    ("self", "usage_context", "headless"),
    "rewrites the launch before any worker starts, and pads the sizes in the model's config",
    VERSIONS,
)
WEIGHTS = Seam(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader.get_all_weights",
    ("self", "model_config", "model"),
    "audits the model, and pads the weights as they stream from the files into the model",
    VERSIONS,
)
LOADED = Seam(
    "vllm.model_executor.model_loader.base_loader",
    "BaseModelLoader.load_model",
    ("self", "vllm_config", "model_config", "prefix"),
    "pads what a loaded model is given in place; puts ep2tp's fused-MoE kernel on the layers that it takes",
    VERSIONS,
)
KERNEL = Seam(
    "vllm.model_executor.layers.fused_moe.modular_kernel",
    "FusedMoEKernel.apply",
    ("self", "hidden_states", "w1", "w2", "topk_weights", "topk_ids"),
    "not wrapped: replaced on the kernel object of such a layer, where ep2tp's kernel is faster",
    VERSIONS,
)
REQUIRED = (SERVE, ENGINE_CONFIG, WEIGHTS, LOADED)
"""The seams without which nothing is rewritten or padded."""
ALL = (*REQUIRED, KERNEL)
