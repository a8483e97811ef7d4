"""vLLM's launch settings that are bound to expert parallelism, and what a tensor-parallel launch does with each.

Checked against ``EngineArgs`` of vLLM 0.25.1, 0.28.0, 0.32.0 and 0.33.0. This module imports no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ep2tp.errors import LaunchError
from ep2tp.model.encoder import uneven_encoder_heads
from ep2tp.rewrite.parallel_plan import Change, LaunchRules, Setting

_EP_FLAG = Setting(
    "enable_expert_parallel",
    ("--enable-expert-parallel", "-ep"),
    "every rank holds a slice of every expert",
    takes_value=False,
)
_EP_ONLY = "this backend runs under expert parallelism only"
_EP_ONLY_BACKENDS = frozenset(
    {
        "aiter_mega_moe",
        "deep_gemm_mega_moe",
        "flashinfer_moe_ep_cutedsl",
        "flashinfer_moe_ep_mega_deep_gemm",
    }
)
_EP_ONLY_BACKEND = Setting("moe_backend", ("--moe-backend",), _EP_ONLY, only=_EP_ONLY_BACKENDS)
DRAFT = "speculative_config"
_DRAFT_BACKEND = Setting(
    f"{DRAFT}.moe_backend", ("--speculative-config.moe_backend",), _EP_ONLY, only=_EP_ONLY_BACKENDS
)
_DRAFT_SIZE = Setting(
    f"{DRAFT}.draft_tensor_parallel_size",
    ("--speculative-config.draft_tensor_parallel_size",),
    "a draft runs on all tensor-parallel ranks, or on one",
)
_DP_BACKEND = Setting("data_parallel_backend", ("--data-parallel-backend", "-dpb"), "no data-parallel ranks are left")
_RANKS_PER_NODE = Setting(
    "data_parallel_size_local", ("--data-parallel-size-local", "-dpl"), "no data-parallel ranks are left"
)
_EXECUTOR = Setting(
    "distributed_executor_backend",
    ("--distributed-executor-backend",),
    "Ray placed the data-parallel ranks, and now places the tensor-parallel ones",
)
_ENCODER = Setting("mm_encoder_tp_mode", ("--mm-encoder-tp-mode",), "each rank encodes whole images")
_PER_RANK = "starts every data-parallel rank by itself; tensor parallelism is one launch over all GPUs."

RULES = LaunchRules(
    engine="vllm",
    tensor_parallel=Setting("tensor_parallel_size", ("--tensor-parallel-size", "-tp"), ""),
    data_parallel=Setting("data_parallel_size", ("--data-parallel-size", "-dp"), "folded into tensor parallelism"),
    pipeline_parallel=Setting("pipeline_parallel_size", ("--pipeline-parallel-size", "-pp"), ""),
    triggers=(_EP_FLAG, _EP_ONLY_BACKEND),
    resets=(
        _EP_FLAG,
        _EP_ONLY_BACKEND,
        Setting(
            "all2all_backend",
            ("--all2all-backend",),
            "tokens are not dispatched: one all_reduce ends a MoE layer",
            neutral=frozenset({"allgather_reducescatter"}),
        ),
        Setting("enable_eplb", ("--enable-eplb",), "no rank has busier experts than another", takes_value=False),
        Setting("eplb_config", ("--eplb-config",), "balances whole experts (redundant experts, too)"),
        Setting("enable_elastic_ep", ("--enable-elastic-ep",), "moves whole experts between ranks", takes_value=False),
        Setting("elastic_ep_max_dp_size", ("--elastic-ep-max-dp-size",), "moves whole experts between ranks"),
        Setting(
            "enable_ep_weight_filter",
            ("--enable-ep-weight-filter",),
            "would skip the weights of experts held by other ranks",
            takes_value=False,
        ),
        Setting("expert_placement_strategy", ("--expert-placement-strategy",), "places whole experts"),
        Setting("enable_dbo", ("--enable-dbo",), "hides an all_to_all that is gone", takes_value=False),
        Setting("ubatch_size", ("--ubatch-size",), "hides an all_to_all that is gone"),
        _RANKS_PER_NODE,
        _DP_BACKEND,
        Setting("data_parallel_address", ("--data-parallel-address", "-dpa"), "no data-parallel ranks are left"),
        Setting("data_parallel_rpc_port", ("--data-parallel-rpc-port", "-dpp"), "no data-parallel ranks are left"),
    ),
    ranks_per_node=_RANKS_PER_NODE,
    nodes=Setting("nnodes", ("--nnodes", "-n"), ""),
    moves=((_DP_BACKEND.field, "ray", _EXECUTOR, "ray"),),
    one_process_per_rank=(
        Setting("data_parallel_rank", ("--data-parallel-rank", "-dpn"), _PER_RANK),
        Setting("data_parallel_start_rank", ("--data-parallel-start-rank", "-dpr"), _PER_RANK),
        Setting("data_parallel_external_lb", ("--data-parallel-external-lb", "-dpe"), _PER_RANK, takes_value=False),
        Setting("data_parallel_hybrid_lb", ("--data-parallel-hybrid-lb", "-dph"), _PER_RANK, takes_value=False),
        Setting(
            "data_parallel_multi_port_external_lb",
            ("--data-parallel-multi-port-external-lb", "-dpm"),
            _PER_RANK,
            takes_value=False,
        ),
    ),
)


PROCESS_PER_RANK = "VLLM_DP_SIZE"


def process_per_rank(variable: str) -> LaunchError:
    """Why a launch in whose environment ``variable`` (with its value) starts each data-parallel rank is refused."""
    return LaunchError(
        f"{variable} starts one process per data-parallel rank; tensor parallelism is one launch over all GPUs. Unset "
        "it and start once with the product as --tensor-parallel-size, or set EP2TP=off"
    )


def given_values(arguments: Any, defaults: Any) -> dict[str, Any]:
    """The settings of :data:`RULES` whose value differs from the engine's default.

    Args:
        arguments: an ``EngineArgs``, or the ``argparse.Namespace`` of ``vllm serve``.
        defaults: the ``EngineArgs`` class.
    """
    given = {}
    for setting in RULES.settings:
        if hasattr(arguments, setting.field):
            value = getattr(arguments, setting.field)
            if value is not None and value != default_of(defaults, setting.field):
                given[setting.field] = value
    if backend := _kernel_config_backend(arguments):
        given.setdefault(_EP_ONLY_BACKEND.field, backend)
    return given


def draft_changes(draft: Any, changes: list[Change]) -> list[Change]:
    """What changes in the settings of a speculative draft in a launch that ``changes`` make tensor parallel.

    Args:
        draft: ``speculative_config`` as given; none of its settings change unless it is a dict.
        changes: the launch's.
    """
    if not isinstance(draft, dict):
        return []
    found = []
    folded = next((change for change in changes if change.setting is RULES.tensor_parallel), None)
    size = draft.get("draft_tensor_parallel_size")
    if folded is not None and size not in (None, 1) and size == folded.before:
        found.append(Change(_DRAFT_SIZE, size, folded.after, _DRAFT_SIZE.why))
    backend = draft.get("moe_backend")
    if _DRAFT_BACKEND.is_bound({_DRAFT_BACKEND.field: backend}):
        found.append(Change(_DRAFT_BACKEND, backend, None, _DRAFT_BACKEND.why))
    return found


def encoder_changes(mode: str | None, config: Mapping[str, Any] | None, ranks: int) -> list[Change]:
    """What changes where vLLM could not slice a model's image encoder over the ranks of a rewritten launch.

    Args:
        mode: ``mm_encoder_tp_mode``; None for a vLLM without it.
        config: the model's config.json, where known.
        ranks: tensor-parallel ranks after the rewrite.
    """
    heads = uneven_encoder_heads(config or {}, ranks)
    if mode != "weights" or heads is None:
        return []
    why = f"the image encoder's {heads} heads do not divide over {ranks} ranks: {_ENCODER.why}"
    return [Change(_ENCODER, mode, "data", why)]


def changed_draft(draft: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    """The settings of a draft after the changes of :func:`draft_changes`."""
    after = {change.setting.field.removeprefix(f"{DRAFT}."): change.after for change in changes}
    return {key: value for key, value in {**draft, **after}.items() if key not in after or value is not None}


def default_of(defaults: Any, name: str) -> Any:
    """The default of a dataclass field; None for a field that this version does not have."""
    field = next((f for f in dataclasses.fields(defaults) if f.name == name), None)
    if field is None:
        return None
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def apply(changes: list[Change], arguments: Any, defaults: Any) -> None:
    """Write the changes into an ``EngineArgs`` or a Namespace in place; idempotent."""
    of_draft = [change for change in changes if change.setting.field.startswith(f"{DRAFT}.")]
    if of_draft:
        arguments.speculative_config = changed_draft(arguments.speculative_config, of_draft)
    for change in changes:
        if change in of_draft:
            continue
        field = change.setting.field
        value = default_of(defaults, field) if change.after is None else change.after
        setattr(arguments, field, value)
        if field == _EP_ONLY_BACKEND.field and _kernel_config_backend(arguments):
            _set_kernel_config_backend(arguments, value)


def _kernel_config_backend(arguments: Any) -> str | None:
    """``--kernel-config.moe_backend``, which vLLM uses where ``--moe-backend`` is not given."""
    config = getattr(arguments, "kernel_config", None)
    backend = config.get("moe_backend") if isinstance(config, dict) else getattr(config, "moe_backend", None)
    return None if backend in (None, "auto") else str(backend)


def _set_kernel_config_backend(arguments: Any, backend: str) -> None:
    if isinstance(arguments.kernel_config, dict):
        arguments.kernel_config = {**arguments.kernel_config, "moe_backend": backend}
    else:
        arguments.kernel_config = dataclasses.replace(arguments.kernel_config, moe_backend=backend)
