"""The table of SGLang's seams. ``docs/seams.md`` says why each of them is where it is."""

from __future__ import annotations

from importlib import metadata

from ep2tp.engines.seams import Seam, release

VERSIONS = ("0.5.17", "0.5.19", "0.5.21", "0.5.23")
_SINCE_0_5_19 = VERSIONS[1:]
_DISPATCHERS = "sglang.srt.layers.moe.token_dispatcher."
_BUFFER = "refuses to make an all-to-all buffer in a launch that was rewritten"

_POST_INIT = Seam(
    "sglang.srt.server_args",
    "ServerArgs.__post_init__",
    ("self",),
    "rewrites the launch before it is resolved",
    ("0.5.17",),
)
_RESOLVE_ONCE = Seam(
    "sglang.srt.server_args",
    "ServerArgs.resolve_once",
    ("self",),
    "rewrites the launch before it is resolved",
    _SINCE_0_5_19,
)
RESOLVED_VIEW = Seam(
    "sglang.srt.arg_groups.overrides",
    "resolved_view",
    ("server_args",),
    "called, not wrapped: reads what a launch was resolved to",
    VERSIONS,
)
MODEL = Seam(
    "sglang.srt.model_loader.loader",
    "_initialize_model",
    ("model_config", "load_config"),
    "pads the sizes in the model's config, which every process reads for itself",
    VERSIONS,
)
WEIGHTS = Seam(
    "sglang.srt.model_loader.loader",
    "DefaultModelLoader._get_all_weights",
    ("self", "model_config", "model"),
    "pads the weights as they stream from the files into the model; reads rank files",
    VERSIONS,
)
LOADED = Seam(
    "sglang.srt.model_executor.model_runner",
    "ModelRunner.load_model",
    ("self",),
    "audits the loaded model: no dispatcher but the standard one, no expert parallelism, padding applied; pads what it "
    "is given in place; puts ep2tp's kernel on it",
    VERSIONS,
)
KERNEL = Seam(
    "sglang.srt.layers.moe.fused_moe_triton.layer",
    "FusedMoE.run_moe_core",
    ("self", "dispatch_output"),
    "not wrapped: replaced on the loaded layers that ep2tp's fused-MoE kernel takes, where it is faster",
    VERSIONS,
)
A2A = Seam(
    "sglang.srt.arg_groups.resolution_hooks",
    "register_resolution_hook",
    ("name",),
    "called, not wrapped: takes back what a model's own defaults turn on again",
    ("0.5.21", "0.5.23"),
)
DECLARE = Seam(
    "sglang.srt.arg_groups.overrides",
    "declare_resolution",
    ("server_args", "source"),
    "called, not wrapped: how such a step sets a value",
    _SINCE_0_5_19,
)
BUFFERS = (
    Seam(_DISPATCHERS + "deepep", "DeepEPBuffer.get_deepep_buffer", ("group",), _BUFFER, VERSIONS),
    Seam(_DISPATCHERS + "deepep_v2", "DeepEPv2Buffer.get_buffer", ("group",), _BUFFER, _SINCE_0_5_19),
    Seam(_DISPATCHERS + "mooncake", "EPBuffer.get_ep_buffer", ("group",), _BUFFER, VERSIONS),
    Seam(_DISPATCHERS + "nixl", "NixlEPBuffer.get_nixl_buffer", ("group",), _BUFFER, VERSIONS),
    Seam(_DISPATCHERS + "pplx", "PplxAllToAllManager.get_all_to_all", ("group",), _BUFFER, VERSIONS),
    Seam(_DISPATCHERS + "moriep", "init_mori_op", ("group",), _BUFFER, VERSIONS),
    Seam(_DISPATCHERS + "moriep", "init_mori_epv2_op", ("group",), _BUFFER, ("0.5.23",)),
)


def version() -> str:
    """The installed SGLang's version."""
    return metadata.version("sglang")


def resolve() -> Seam:
    """Where the installed SGLang resolves a launch: 0.5.19 made it a step of its own."""
    return _POST_INIT if release(version(), 3) < (0, 5, 19) else _RESOLVE_ONCE


def required() -> tuple[Seam, ...]:
    """The seams without which nothing is rewritten or padded."""
    return (resolve(), RESOLVED_VIEW, MODEL, WEIGHTS, LOADED)


ALL = (_POST_INIT, _RESOLVE_ONCE, RESOLVED_VIEW, MODEL, WEIGHTS, LOADED, KERNEL, A2A, DECLARE, *BUFFERS)
