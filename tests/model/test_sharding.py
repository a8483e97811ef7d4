"""Plans for classes of weights that are cut over different numbers of ranks, and for names that no patch knows."""

from __future__ import annotations

from typing import Any

import pytest

from ep2tp.errors import CheckpointError
from ep2tp.model.families import load_families
from ep2tp.model.locate import facts_of
from ep2tp.model.sharding import ShardPlan, plan_shards

CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "intermediate_size": 10944,
    "first_k_dense_replace": 1,
    "vocab_size": 151552,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def plan(ranks: int, dense_ranks: int | None = None) -> ShardPlan:
    return plan_shards(facts_of(CONFIG, "GLM-4.5-Air", load_families()), ranks, dense_ranks=dense_ranks)


def test_a_class_is_padded_for_the_ranks_that_cut_it() -> None:
    """Data parallelism without expert parallelism: routed experts over 8 ranks, the dense layer over 2 of them."""
    found = plan(8, dense_ranks=2)
    assert found.fields == {"moe_intermediate_size": (1408, 2048), "intermediate_size": (10944, 11008)}
    scales = found.tensor("model.layers.0.mlp.down_proj.weight_scale_inv", (32, 86), "F32")
    assert scales is not None and scales.cut is not None
    assert (scales.cut.padded, scales.split.ranks) == (86, 2)
    expert = found.tensor("model.layers.1.mlp.experts.0.down_proj.weight_scale_inv", (32, 11), "F32")
    assert expert is not None and expert.cut is not None
    assert (expert.cut.padded, expert.split.ranks) == (16, 8)


def test_weights_to_be_padded_that_no_name_fits_are_an_error() -> None:
    found = plan(2)
    assert found.fields.keys() == {"moe_intermediate_size", "intermediate_size"}
    with pytest.raises(CheckpointError, match=r"GLM-4.5-Air: no tensor .*'glm4_moe'.*routed.*EP2TP_PATCHES"):
        found.check_found([])
    found.check_found(["routed"])
    plan(1).check_found([])


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("model.layers.3.mlp.experts.w13_weight", True),
        ("model.layers.3.mlp.experts.0.w13.weight_scale_inv", True),
        ("mtp.layers.0.mlp.experts.gate_up_proj", True),
        ("llm.model.layers.3.mlp.experts.7.down_proj.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.mlp.gate.e_score_correction_bias", False),
        ("model.layers.3.mlp.experts.e_score_correction_bias", False),
        ("model.layers.3.mlp.experts.router.weight", False),
        ("mtp.layers.0.mlp.shared_experts.up_proj.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_an_expert_that_no_name_fits_is_refused_where_experts_are_padded(name: str, is_refused: bool) -> None:
    """Whatever else is known: a checkpoint's shared experts may have names that fit, and its routed ones not."""
    assert plan(1).tensor(name, (4, 352, 256), "BF16") is None
    if not is_refused:
        assert plan(2).tensor(name, (4, 352, 256), "BF16") is None
        return
    with pytest.raises(CheckpointError, match=rf"{name}: patch 'glm4_moe' has no such name, .* EP2TP_PATCHES"):
        plan(2).tensor(name, (4, 352, 256), "BF16")
