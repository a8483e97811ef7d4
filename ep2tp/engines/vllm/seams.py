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
ALL = (SERVE, ENGINE_CONFIG, WEIGHTS)
