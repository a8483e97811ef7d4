"""SGLang's launch settings that are bound to expert parallelism, and what a tensor-parallel launch does with each.

Read from ``server_args.py`` of SGLang 0.5.17 and ``arg_groups/fields`` of 0.5.23. This module imports no engine.
"""

from __future__ import annotations

from ep2tp.rewrite.parallel_plan import LaunchRules, Setting

_ONE = frozenset({"1"})
_NONE = frozenset({"none"})
_DISPATCH = "tokens are not dispatched: one all_reduce ends a MoE layer"
_WHOLE = "places or balances whole experts"
_OVERLAP = "hides an all_to_all that is gone"
_ATTENTION = "attention is tensor parallel, too; the GPUs stay the same"

_A2A = Setting("moe_a2a_backend", ("--moe-a2a-backend",), _DISPATCH, neutral=_NONE)
_EP_SIZE = Setting(
    "ep_size",
    ("--ep-size", "--ep", "--expert-parallel-size"),
    "every rank holds a slice of every expert",
    neutral=_ONE,
)
_RUNNER = Setting(
    "moe_runner_backend",
    ("--moe-runner-backend",),
    "this backend runs under expert parallelism only",
    only=frozenset({"megamoe", "flashinfer_megamoe"}),
)
_WATERFILL = Setting("enable_waterfill", ("--enable-waterfill",), _WHOLE, takes_value=False)
_EPLB = Setting("enable_eplb", ("--enable-eplb",), _WHOLE, takes_value=False)
_DWDP = Setting("dwdp_size", ("--dwdp-size",), _WHOLE, neutral=_ONE)
_ELASTIC = Setting("elastic_ep_backend", ("--elastic-ep-backend",), _WHOLE, neutral=_NONE)

RULES = LaunchRules(
    engine="sglang",
    tensor_parallel=Setting("tp_size", ("--tp-size", "--tp", "--tensor-parallel-size"), ""),
    data_parallel=None,
    pipeline_parallel=Setting("pp_size", ("--pp-size", "--pp", "--pipeline-parallel-size"), ""),
    triggers=(_EP_SIZE, _A2A, _RUNNER, _WATERFILL, _EPLB, _DWDP, _ELASTIC),
    resets=(
        _EP_SIZE,
        _A2A,
        _RUNNER,
        _WATERFILL,
        _EPLB,
        _DWDP,
        _ELASTIC,
        Setting("speculative_moe_a2a_backend", ("--speculative-moe-a2a-backend",), _DISPATCH, neutral=_NONE),
        Setting("deepep_mode", ("--deepep-mode",), _DISPATCH),
        Setting("deepep_config", ("--deepep-config",), _DISPATCH),
        Setting("dp_size", ("--dp-size", "--dp", "--data-parallel-size"), _ATTENTION, only_with="enable_dp_attention"),
        Setting("enable_dp_attention", ("--enable-dp-attention",), _ATTENTION, takes_value=False),
        Setting("attn_dp_size", ("--attn-dp-size", "--attention-data-parallel-size"), _ATTENTION, neutral=_ONE),
        Setting("enable_dp_lm_head", ("--enable-dp-lm-head",), _ATTENTION, takes_value=False),
        Setting("moe_dense_tp_size", ("--moe-dense-tp-size",), "dense MLPs are sliced over all ranks, too"),
        Setting("moe_dp_size", ("--moe-dp-size", "--moe-data-parallel-size"), _WHOLE, neutral=_ONE),
        Setting("ep_num_redundant_experts", ("--ep-num-redundant-experts",), _WHOLE, neutral=frozenset({"0"})),
        Setting("init_expert_location", ("--init-expert-location",), _WHOLE),
        Setting("ep_dispatch_algorithm", ("--ep-dispatch-algorithm",), _WHOLE),
        Setting("max_ep_size", ("--max-ep-size",), _WHOLE),
        Setting("eplb_algorithm", ("--eplb-algorithm",), _WHOLE),
        Setting("enable_two_batch_overlap", ("--enable-two-batch-overlap",), _OVERLAP, takes_value=False),
        Setting("enable_single_batch_overlap", ("--enable-single-batch-overlap",), _OVERLAP, takes_value=False),
        Setting("enable_tp_lm_head_all_to_all", ("--enable-tp-lm-head-all-to-all",), _DISPATCH, takes_value=False),
    ),
)
