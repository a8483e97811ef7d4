"""SGLang's launch settings that are bound to expert parallelism, and what a tensor-parallel launch does with each.

Read from ``server_args.py`` of SGLang 0.5.17 and ``arg_groups/fields`` of 0.5.19 to 0.5.23. Imports no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ep2tp.rewrite.parallel_plan import Change, Divided, LaunchRules, Setting

_ONE = frozenset({"1"})
_ZERO = frozenset({"0"})
_NONE = frozenset({"none", "ascend_tp"})  # ascend_tp is another name of "none" for one platform
_MEGA = frozenset({"megamoe", "flashinfer_megamoe"})
_DISPATCH = "tokens are not dispatched: one all_reduce ends a MoE layer"
_WHOLE = "places or balances whole experts"
_OVERLAP = "hides an all_to_all that is gone"
_ATTENTION = "attention is tensor parallel, too; the GPUs stay the same"
_DENSE = "shared experts and dense MLPs are sliced over all ranks, too"
_EP_ONLY = "this backend runs under expert parallelism only"

_A2A = Setting("moe_a2a_backend", ("--moe-a2a-backend",), _DISPATCH, neutral=_NONE)
_EP_SIZE = Setting(
    "ep_size",
    ("--ep-size", "--ep", "--expert-parallel-size"),
    "every rank holds a slice of every expert",
    neutral=_ONE,
)
_RUNNER = Setting("moe_runner_backend", ("--moe-runner-backend",), _EP_ONLY, only=_MEGA)
_WATERFILL = Setting("enable_waterfill", ("--enable-waterfill",), _WHOLE, takes_value=False)
_EPLB = Setting("enable_eplb", ("--enable-eplb",), _WHOLE, takes_value=False)
_DWDP = Setting("dwdp_size", ("--dwdp-size",), _WHOLE, neutral=_ONE)
_ELASTIC = Setting("elastic_ep_backend", ("--elastic-ep-backend",), _WHOLE, neutral=_NONE)
_PREFILL_CP = Setting(
    "enable_prefill_cp",
    ("--enable-prefill-cp",),
    "this model's prefill context parallelism needs DeepEP; attention is tensor parallel instead",
    takes_value=False,
)
_CP_STRATEGY = Setting("cp_strategy", ("--cp-strategy",), _ATTENTION, only_with="enable_prefill_cp")
_DP_SIZE = Setting(
    "dp_size", ("--dp-size", "--dp", "--data-parallel-size"), _ATTENTION, only_with="enable_dp_attention"
)
_ATTN_DP_SIZE = Setting("attn_dp_size", ("--attn-dp-size", "--attention-data-parallel-size"), _ATTENTION, neutral=_ONE)
_CHUNK = Setting(
    "chunked_prefill_size",
    ("--chunked-prefill-size",),
    "what a rank was given: SGLang divides it over the ranks of data-parallel attention",
)
_TRIGGERS = (_EP_SIZE, _A2A, _RUNNER, _WATERFILL, _EPLB, _DWDP, _ELASTIC, _PREFILL_CP)

RULES = LaunchRules(
    engine="sglang",
    tensor_parallel=Setting("tp_size", ("--tp-size", "--tp", "--tensor-parallel-size"), ""),
    data_parallel=None,
    pipeline_parallel=Setting("pp_size", ("--pp-size", "--pp", "--pipeline-parallel-size"), ""),
    triggers=_TRIGGERS,
    resets=(
        *_TRIGGERS,
        Setting("speculative_moe_a2a_backend", ("--speculative-moe-a2a-backend",), _DISPATCH, neutral=_NONE),
        Setting("speculative_moe_runner_backend", ("--speculative-moe-runner-backend",), _EP_ONLY, only=_MEGA),
        Setting("deepep_mode", ("--deepep-mode",), _DISPATCH),
        Setting("deepep_v2_mode", ("--deepep-v2-mode",), _DISPATCH),
        Setting("deepep_config", ("--deepep-config",), _DISPATCH),
        Setting("deepep_dispatcher_output_dtype", ("--deepep-dispatcher-output-dtype",), _DISPATCH),
        Setting("flashinfer_a2a_dispatch_type", ("--flashinfer-a2a-dispatch-type",), _DISPATCH),
        Setting("fuseep_mode", ("--fuseep-mode",), _DISPATCH),
        Setting("enable_w4a4_mxfp4_megamoe", ("--enable-w4a4-mxfp4-megamoe",), _EP_ONLY, takes_value=False),
        Setting("enable_megamoe_for_layernorm_sp", ("--enable-megamoe-for-layernorm-sp",), _EP_ONLY, takes_value=False),
        _DP_SIZE,
        Setting("enable_dp_attention", ("--enable-dp-attention",), _ATTENTION, takes_value=False),
        _ATTN_DP_SIZE,
        Setting(
            "enable_dp_attention_local_control_broadcast",
            ("--enable-dp-attention-local-control-broadcast",),
            _ATTENTION,
            takes_value=False,
        ),
        Setting("enable_dp_lm_head", ("--enable-dp-lm-head",), _ATTENTION, takes_value=False),
        Setting(
            "attn_cp_size",
            ("--attn-cp-size", "--attention-context-parallel-size"),
            _ATTENTION,
            neutral=_ONE,
            only_with="enable_prefill_cp",
        ),
        _CP_STRATEGY,
        Setting("moe_dense_tp_size", ("--moe-dense-tp-size",), _DENSE),
        Setting("shared_experts_tp_size", ("--shared-experts-tp-size",), _DENSE),
        Setting("enable_shared_experts_attn_tp", ("--enable-shared-experts-attn-tp",), _DENSE, takes_value=False),
        Setting("enable_dense_mlp_attn_tp", ("--enable-dense-mlp-attn-tp",), _DENSE, takes_value=False),
        Setting("moe_dp_size", ("--moe-dp-size", "--moe-data-parallel-size"), _WHOLE, neutral=_ONE),
        Setting("ep_num_redundant_experts", ("--ep-num-redundant-experts",), _WHOLE, neutral=_ZERO),
        Setting("init_expert_location", ("--init-expert-location",), _WHOLE, neutral=frozenset({"trivial"})),
        Setting("ep_dispatch_algorithm", ("--ep-dispatch-algorithm",), _WHOLE),
        Setting("eplb_algorithm", ("--eplb-algorithm",), _WHOLE, neutral=frozenset({"auto"})),
        Setting("max_ep_size", ("--max-ep-size",), _WHOLE),
        Setting("ep_join_mode", ("--elastic-ep-join-mode",), _WHOLE),
        Setting("ep_join_rank_offset", ("--elastic-ep-join-rank-offset",), _WHOLE, neutral=_ZERO),
        Setting("elastic_ep_initial_size", ("--elastic-ep-initial-size",), _WHOLE),
        Setting("elastic_ep_rejoin", ("--elastic-ep-rejoin",), _WHOLE, takes_value=False),
        Setting("enable_elastic_expert_backup", ("--enable-elastic-expert-backup",), _WHOLE, takes_value=False),
        Setting("enable_two_batch_overlap", ("--enable-two-batch-overlap",), _OVERLAP, takes_value=False),
        Setting("enable_single_batch_overlap", ("--enable-single-batch-overlap",), _OVERLAP, takes_value=False),
        Setting("enable_tp_lm_head_all_to_all", ("--enable-tp-lm-head-all-to-all",), _DISPATCH, takes_value=False),
        Setting("dcp_comm_backend", ("--dcp-comm-backend",), _DISPATCH, only=frozenset({"a2a", "fi_a2a"})),
    ),
    divided=Divided(_CHUNK, (_ATTN_DP_SIZE, _DP_SIZE)),
)


def given_values(arguments: Any) -> dict[str, Any]:
    """The settings of :data:`RULES` whose value in a ``ServerArgs`` differs from SGLang's default."""
    given = {}
    for setting in RULES.settings:
        value = getattr(arguments, setting.field, None)
        if value is not None and value != default_of(type(arguments), setting.field):
            given[setting.field] = value
    return given


def default_of(record: type, name: str) -> Any:
    """The default of a field of ``ServerArgs``, a dataclass up to 0.5.20 and a msgspec Struct since."""
    if dataclasses.is_dataclass(record):
        return next(field.default for field in dataclasses.fields(record) if field.name == name)
    import msgspec

    return next(field.default for field in msgspec.structs.fields(record) if field.name == name)


def apply(changes: list[Change], arguments: Any) -> None:
    """Write the changes into a ``ServerArgs`` that is not resolved yet, in place; idempotent."""
    for change in changes:
        field = change.setting.field
        value = default_of(type(arguments), field) if change.after is None else change.after
        setattr(arguments, field, value)


def without_harmless_prefill_cp(values: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values without prefill context parallelism where that asks for no expert parallelism.

    SGLang turns DeepEP on for it under multi-head latent attention, and under DeepSeek's sparse attention with the
    zigzag strategy (``arg_groups/overrides.py`` of 0.5.17, ``model_overrides/deepseek_v2.py`` of 0.5.23).
    """
    if _PREFILL_CP.field not in values:
        return dict(values)
    from ep2tp.model.families import config_parts

    parts = config_parts(config or {})
    is_mla = any(part.get("kv_lora_rank") for part in parts)
    is_sparse = any(part.get("index_topk") for part in parts)
    if is_mla and (not is_sparse or values.get(_CP_STRATEGY.field) == "zigzag"):
        return dict(values)
    return {name: value for name, value in values.items() if name != _PREFILL_CP.field}
