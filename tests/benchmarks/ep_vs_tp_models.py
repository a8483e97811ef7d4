"""The models that ep_vs_tp.py times: shapes of published ones, with fewer layers and random weights.

Sizes are those of each model's config.json. Layers and dense first layers are fewer, so that one or two GPUs hold them;
FP8 is in blocks of 128x128 for all of them, in which not all are published.
"""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_DEEPSEEK_V3 = {
    **_SHARED,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 129280,
}
_KIMI_K2 = {
    **_DEEPSEEK_V3,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
}
_GLM_4_5 = {
    **_SHARED,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "vocab_size": 151552,
}
_GLM_4_5_AIR = {
    **_GLM_4_5,
    "hidden_size": 4096,
    "use_qk_norm": False,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
}
_QWEN3_235B = {
    **{key: value for key, value in _SHARED.items() if key != "first_k_dense_replace"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_SHAPES = {
    "v3": _DEEPSEEK_V3,
    "kimi-k2": _KIMI_K2,
    "glm-4.5": _GLM_4_5,
    "glm-4.5-air": _GLM_4_5_AIR,
    "qwen3-235b": _QWEN3_235B,
}
MODELS: dict[str, dict[str, Any]] = {
    **{
        f"{name}-fp8": {**shape, "num_hidden_layers": 9, "quantization_config": _FP8} for name, shape in _SHAPES.items()
    },
    **{f"{name}-bf16": {**shape, "num_hidden_layers": 9} for name, shape in _SHAPES.items()},
}


def model_config(name: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a model, with as many layers as asked for."""
    return {**MODELS[name], **({"num_hidden_layers": layers} if layers else {})}
