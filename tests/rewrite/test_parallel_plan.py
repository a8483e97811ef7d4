from __future__ import annotations

from typing import Any

import pytest

from ep2tp.engines.sglang.arguments import RULES as SGLANG
from ep2tp.engines.vllm.arguments import RULES as VLLM
from ep2tp.errors import LaunchError
from ep2tp.rewrite.parallel_plan import Limits, to_tensor_parallel

EP = {"enable_expert_parallel": True}


def changed(rules: Any, values: dict[str, Any], limits: Limits | None = None) -> dict[str, tuple[Any, Any]]:
    return {c.setting.field: (c.before, c.after) for c in to_tensor_parallel(rules, values, limits)}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tensor_parallel_size": 8},
        {"data_parallel_size": 4},
        {"tensor_parallel_size": 2, "all2all_backend": "deepep_low_latency"},
        {"moe_backend": "triton"},
    ],
)
def test_launches_without_expert_parallelism_are_left_alone(values: dict[str, Any]) -> None:
    assert changed(VLLM, values) == {}


def test_tp_with_ep_drops_the_flag_alone() -> None:
    assert changed(VLLM, EP | {"tensor_parallel_size": 2}) == {"enable_expert_parallel": (True, None)}


@pytest.mark.parametrize(("tp", "dp", "folded"), [(1, 4, 4), (2, 4, 8), (8, 2, 16)])
def test_dp_is_folded_into_tp(tp: int, dp: int, folded: int) -> None:
    changes = changed(VLLM, EP | {"tensor_parallel_size": tp, "data_parallel_size": dp})
    assert changes["tensor_parallel_size"] == (tp, folded)
    assert changes["data_parallel_size"] == (dp, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("all2all_backend", "deepep_low_latency"),
        ("all2all_backend", "moonep"),
        ("enable_eplb", True),
        ("eplb_config", {"num_redundant_experts": 32}),
        ("enable_elastic_ep", True),
        ("enable_ep_weight_filter", True),
        ("expert_placement_strategy", "round_robin"),
        ("enable_dbo", True),
        ("ubatch_size", 2),
        ("data_parallel_backend", "ray"),
        ("data_parallel_size_local", 1),
    ],
)
def test_everything_bound_to_expert_parallelism_goes_with_it(field: str, value: Any) -> None:
    assert changed(VLLM, EP | {field: value})[field] == (value, None)


def test_ray_moves_from_the_data_parallel_to_the_tensor_parallel_ranks() -> None:
    changes = changed(VLLM, EP | {"data_parallel_size": 2, "data_parallel_backend": "ray"})
    assert changes["distributed_executor_backend"] == ("default", "ray")


def test_ranks_that_other_nodes_start_are_refused() -> None:
    values = EP | {"data_parallel_size": 16, "data_parallel_size_local": 8}
    with pytest.raises(LaunchError, match="--tensor-parallel-size 16 --nnodes 2 --node-rank I"):
        changed(VLLM, values)
    assert changed(VLLM, values | {"nnodes": 2})["tensor_parallel_size"] == (1, 16)
    assert changed(VLLM, values | {"data_parallel_backend": "ray"})["tensor_parallel_size"] == (1, 16)


def test_a_size_that_is_no_number_is_refused() -> None:
    with pytest.raises(LaunchError, match="--data-parallel-size four: expected a number"):
        changed(VLLM, EP | {"data_parallel_size": "four"})


@pytest.mark.parametrize(
    "backend",
    ["deep_gemm_mega_moe", "flashinfer_moe_ep_cutedsl", "flashinfer-moe-ep-mega-deep-gemm", "aiter_mega_moe"],
)
def test_backends_that_run_under_ep_only_ask_for_it_by_themselves(backend: str) -> None:
    assert changed(VLLM, {"moe_backend": backend}) == {"moe_backend": (backend, None)}


def test_other_moe_backends_stay() -> None:
    assert "moe_backend" not in changed(VLLM, EP | {"moe_backend": "triton"})


@pytest.mark.parametrize(
    "values",
    [
        {"data_parallel_rank": 1},
        {"data_parallel_start_rank": 2},
        {"data_parallel_external_lb": True},
        {"data_parallel_hybrid_lb": True},
        {"data_parallel_multi_port_external_lb": True},
    ],
)
def test_one_process_per_rank_is_refused_with_the_launch_that_works(values: dict[str, Any]) -> None:
    with pytest.raises(LaunchError, match="--tensor-parallel-size 8"):
        changed(VLLM, EP | {"tensor_parallel_size": 2, "data_parallel_size": 4} | values)


@pytest.mark.parametrize(
    ("limits", "dp", "uneven", "sizes"),
    [
        # GLM-4.5: heads over 5, and 8 key-value heads. MLA of Kimi-K2: 64 heads over 6. GQA: 6 ranks for 4 heads.
        (Limits(96, 8, 151552), 5, "96 attention heads and 8 key-value heads and 151552 vocabulary rows", "1, 2, 4"),
        (Limits(64, None, 163840), 6, "64 attention heads and 163840 vocabulary rows", "1, 2, 4"),
        (Limits(48, 4, 768), 6, "4 key-value heads", "1, 2, 4"),
        # GLM-4.7-Flash: 154880 rows divide over 8 ranks.
        (Limits(20, None, 154880), 8, "20 attention heads", "1, 2, 4, 5"),
        # The vocabulary: 129280 rows of DeepSeek-V3 do not divide by 3, its 128 heads do not, either; 96 heads would.
        (Limits(96, None, 129280), 3, "129280 vocabulary rows", "1, 2"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_sizes_that_do(
    limits: Limits, dp: int, uneven: str, sizes: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        changed(VLLM, EP | {"data_parallel_size": dp}, limits)
    start = f"{uneven} do not divide over {dp} tensor-parallel ranks. Sizes up to {dp} that work: {sizes}. On"
    assert str(caught.value).startswith(start)


def test_a_plan_with_pipeline_stages_is_offered_for_the_same_gpus() -> None:
    with pytest.raises(LaunchError, match="--tensor-parallel-size 2 --pipeline-parallel-size 6"):
        changed(VLLM, EP | {"data_parallel_size": 6, "pipeline_parallel_size": 2}, Limits(64, None, 163840))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tp_size": 8, "ep_size": 8}, {"ep_size"}),
        ({"tp_size": 8, "moe_a2a_backend": "deepep", "deepep_mode": "auto"}, {"moe_a2a_backend", "deepep_mode"}),
        (
            {"tp_size": 8, "moe_a2a_backend": "deepep", "enable_dp_attention": True, "dp_size": 8},
            {"moe_a2a_backend", "enable_dp_attention", "dp_size"},
        ),
        ({"tp_size": 8, "moe_runner_backend": "megamoe"}, {"moe_runner_backend"}),
        ({"tp_size": 8, "ep_size": 2, "enable_two_batch_overlap": True}, {"ep_size", "enable_two_batch_overlap"}),
        ({"tp_size": 4, "ep_size": 4, "dp_size": 2}, {"ep_size"}),  # replicas, not attention parallelism
        ({"tp_size": 8, "ep_size": 1, "moe_a2a_backend": "none"}, set()),
        ({"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}, set()),
    ],
)
def test_sglang_launches(values: dict[str, Any], expected: set[str]) -> None:
    assert set(changed(SGLANG, values)) == expected


@pytest.mark.parametrize(
    ("values", "chunk"),
    [
        ({"enable_dp_attention": True, "dp_size": 8}, 4096),
        ({"attn_dp_size": 4}, 8192),
        ({"enable_dp_attention": True, "dp_size": 8, "chunked_prefill_size": -1}, None),
        ({"dp_size": 8}, None),  # replicas, each with a prefill of its own
        ({}, None),
    ],
)
def test_a_chunk_that_sglang_divides_over_data_parallel_ranks_stays_what_a_rank_was_given(
    values: dict[str, Any], chunk: int | None
) -> None:
    given = {"tp_size": 8, "ep_size": 8, "chunked_prefill_size": 32768} | values
    changes = {change.setting.field: change.after for change in to_tensor_parallel(SGLANG, given)}
    assert changes.get("chunked_prefill_size") == chunk
