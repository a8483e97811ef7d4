"""Writes tiny random checkpoints in the layouts of DeepSeek-V2 and V3, Kimi-K2, GLM-4.5 and Qwen3-MoE.

Names and shapes follow the published checkpoints (one tensor per expert and projection); the attention sizes are the
smallest that vLLM's CPU kernels take. Needs torch and safetensors, which every engine brings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Tensors = Iterator[tuple[str, "torch.Tensor"]]

_MLA = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
_DEEPSEEK_ROUTING = {
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


@dataclass(frozen=True)
class TinyModel:
    """A tiny checkpoint to write.

    Attributes:
        family: ``deepseek_v2``, ``deepseek_v3``, ``kimi_k2``, ``glm4_moe`` or ``qwen3_moe``.
        expert_size: ``moe_intermediate_size``.
        shared_experts: ``n_shared_experts``; Qwen3-MoE has none.
        dense_size: ``intermediate_size`` of the dense first layer; Qwen3-MoE has none.
        mtp_layers: multi-token-prediction layers after the last one (DeepSeek-V3's layout).
    """

    family: str = "deepseek_v3"
    hidden: int = 256
    heads: int = 6
    kv_heads: int = 2
    layers: int = 3
    experts: int = 8
    top_k: int = 2
    expert_size: int = 72
    shared_experts: int = 1
    dense_size: int = 320
    vocabulary: int = 768
    mtp_layers: int = 0
    seed: int = 0

    @property
    def uses_mla(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.family in ("deepseek_v2", "deepseek_v3", "kimi_k2")

    @property
    def has_router_bias(self) -> bool:
        """Whether the router adds a bias to each expert's score before it chooses."""
        return self.family not in ("deepseek_v2", "qwen3_moe")

    @property
    def dense_layers(self) -> int:
        """Layers before the first MoE layer."""
        return 0 if self.family == "qwen3_moe" else 1

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        config: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads if self.uses_mla else self.kv_heads,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_size,
            "intermediate_size": self.dense_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        return config | self._family_config()

    def _family_config(self) -> dict[str, Any]:
        if self.family == "qwen3_moe":
            return {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "num_experts": self.experts,
                "head_dim": 64,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
            }
        deepseek = {
            "n_routed_experts": self.experts,
            "n_shared_experts": self.shared_experts,
            "first_k_dense_replace": self.dense_layers,
            "num_nextn_predict_layers": self.mtp_layers,
            **_DEEPSEEK_ROUTING,
        }
        if self.family == "glm4_moe":
            glm = {"head_dim": 64, "partial_rotary_factor": 0.5, "attention_bias": True, "use_qk_norm": True}
            return {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", **glm, **deepseek}
        if self.family == "deepseek_v2":
            deepseek |= {"topk_method": "greedy", "scoring_func": "softmax"}
        # Kimi-K2's own config is "kimi_k2" over DeepSeek-V3's architecture; engines read it as DeepSeek-V3.
        version = "V2" if self.family == "deepseek_v2" else "V3"
        return {
            "architectures": [f"Deepseek{version}ForCausalLM"],
            "model_type": self.family,
            "moe_layer_freq": 1,
            "rope_scaling": _YARN,
            "max_position_embeddings": 163840,
            **_MLA,
            **deepseek,
        }

    def write(self, folder: Path, dtype: str = "bfloat16") -> Path:
        """Write config.json and model.safetensors; the same seed gives the same bytes. Returns the folder."""
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {name: t.to(getattr(torch, dtype)) for name, t in self._tensors(generator)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config() | {"torch_dtype": dtype}, indent=1))
        return folder

    def _tensors(self, generator: torch.Generator) -> Tensors:
        import torch

        def matrix(rows: int, cols: int) -> torch.Tensor:
            return torch.randn(rows, cols, generator=generator) * (2.0 / cols**0.5)

        embedding = torch.randn(self.vocabulary, self.hidden, generator=generator)
        yield "model.embed_tokens.weight", embedding
        for layer in range(self.layers, self.layers + self.mtp_layers):
            yield from self._mtp(f"model.layers.{layer}", embedding, matrix)
        for layer in range(self.layers + self.mtp_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", torch.ones(self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", torch.ones(self.hidden)
            for name, rows, cols in self._attention():
                yield f"{prefix}.self_attn.{name}", matrix(rows, cols) if cols else torch.ones(rows)
            for module, size in self._mlps(layer):
                yield f"{prefix}.mlp.{module}gate_proj.weight", matrix(size, self.hidden)
                yield f"{prefix}.mlp.{module}up_proj.weight", matrix(size, self.hidden)
                yield f"{prefix}.mlp.{module}down_proj.weight", matrix(self.hidden, size)
            if layer >= self.dense_layers:
                yield f"{prefix}.mlp.gate.weight", matrix(self.experts, self.hidden)
                if self.has_router_bias:
                    bias = torch.randn(self.experts, generator=generator) * 0.1
                    yield f"{prefix}.mlp.gate.e_score_correction_bias", bias
        yield "model.norm.weight", torch.ones(self.hidden)
        yield "lm_head.weight", matrix(self.vocabulary, self.hidden)

    def _mtp(self, prefix: str, embedding: torch.Tensor, matrix: Callable[[int, int], torch.Tensor]) -> Tensors:
        """What an MTP layer has beside a decoder layer's tensors."""
        import torch

        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}.{norm}.weight", torch.ones(self.hidden)
        yield f"{prefix}.eh_proj.weight", matrix(self.hidden, 2 * self.hidden)
        yield f"{prefix}.embed_tokens.weight", embedding.clone()
        yield f"{prefix}.shared_head.head.weight", matrix(self.vocabulary, self.hidden)

    def _attention(self) -> Iterator[tuple[str, int, int]]:
        """(name, rows, columns) of the attention's tensors; no columns for vectors."""
        heads, kv_heads = self.heads, self.kv_heads
        if self.uses_mla:
            yield "q_proj.weight", heads * 192, self.hidden
            yield "kv_a_proj_with_mqa.weight", 512 + 64, self.hidden
            yield "kv_a_layernorm.weight", 512, 0
            yield "kv_b_proj.weight", heads * 256, 512
            yield "o_proj.weight", self.hidden, heads * 128
            return
        yield "q_proj.weight", heads * 64, self.hidden
        yield "k_proj.weight", kv_heads * 64, self.hidden
        yield "v_proj.weight", kv_heads * 64, self.hidden
        yield "o_proj.weight", self.hidden, heads * 64
        yield "q_norm.weight", 64, 0
        yield "k_norm.weight", 64, 0
        if self.family == "glm4_moe":
            yield "q_proj.bias", heads * 64, 0
            yield "k_proj.bias", kv_heads * 64, 0
            yield "v_proj.bias", kv_heads * 64, 0

    def _mlps(self, layer: int) -> Iterator[tuple[str, int]]:
        """(module prefix, intermediate size) of a layer's MLPs."""
        if layer < self.dense_layers:
            yield "", self.dense_size
            return
        for expert in range(self.experts):
            yield f"experts.{expert}.", self.expert_size
        if self.family != "qwen3_moe":
            yield "shared_experts.", self.expert_size * self.shared_experts
