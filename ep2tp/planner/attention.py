"""Sizes of a model's attention: parameters by how they are sliced, and bytes of KV cache. From config.json alone.

Kinds: multi-head latent attention (MLA: DeepSeek, Kimi, GLM-5), grouped-query attention (GQA: GLM-4.5, Qwen3,
gpt-oss), linear attention beside either (gated delta nets of Qwen3-Next, KDA of Kimi-Linear), DeepSeek-V4's compressed
attention. Shapes follow Transformers 5.19 and the model files of vLLM 0.33.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ep2tp.model.facts import ModelFacts
from ep2tp.planner.cache_format import INDEXER_KEY_BYTES, compressed_bytes, latent_bytes, value_bytes
from ep2tp.planner.layers import layers_of, text_part
from ep2tp.planner.linear_state import state_bytes, state_heads

_ROPE = 64


@dataclass(frozen=True)
class Attention:
    """One layer's attention, averaged over the layers.

    Attributes:
        sliced: parameters that every engine slices over the attention's ranks.
        kv: parameters of the key and value projections, of which no more slices exist than there are KV heads.
        replicated: parameters that every rank holds (latent projections of MLA, sparse attention's indexer).
        kv_heads: KV heads, or None where the cache is a latent that every rank holds whole (MLA).
        cache_bytes: bytes of KV cache for a token, over all heads, of which all tokens are read.
        windowed_cache_bytes: the same, of layers that keep no more than ``window`` tokens.
        window: tokens of a sliding window.
        selected_cache_bytes: the same, of sparse attention: all tokens are kept, no more than ``selected`` are read.
        selected: tokens of a sequence that sparse attention selects.
        state_bytes: bytes of state that linear attention keeps of a sequence of any length, over all heads.
        state_heads: heads of that state, or 0 without linear attention.
        is_estimate: whether the model has parts that this arithmetic does not know.
    """

    sliced: float
    kv: float
    replicated: float
    kv_heads: int | None
    cache_bytes: float
    windowed_cache_bytes: float = 0.0
    window: int = 0
    selected_cache_bytes: float = 0.0
    selected: int = 0
    state_bytes: float = 0.0
    state_heads: int = 0
    is_estimate: bool = False

    def ranks_of_kv(self, ranks: int) -> int:
        """Distinct slices of the KV heads over ``ranks`` ranks; engines replicate KV heads over more."""
        return 1 if self.kv_heads is None else min(ranks, self.kv_heads)

    def cache_of(self, tokens: int) -> float:
        """Bytes of KV cache that one sequence of ``tokens`` takes in one layer, before slicing; without state."""
        kept = self.cache_bytes + self.selected_cache_bytes
        return tokens * kept + min(tokens, self.window) * self.windowed_cache_bytes

    def read_of(self, tokens: int) -> float:
        """Bytes of it that a new token reads; of sparse attention, all keys of the indexer, and what it selects."""
        return self.cache_of(tokens) - max(0, tokens - self.selected) * self.selected_cache_bytes

    def state_on_rank(self, ranks: int) -> float:
        """Bytes of linear attention's state that one of ``ranks`` ranks keeps of a sequence in one layer."""
        return self.state_bytes / max(1, min(ranks, self.state_heads))

    def held_on_rank(self, tokens: int, ranks: int) -> float:
        """Bytes, cache and state, that one of ``ranks`` ranks holds of a sequence of ``tokens`` in one layer."""
        return self.cache_of(tokens) / self.ranks_of_kv(ranks) + self.state_on_rank(ranks)


def attention_of(facts: ModelFacts) -> Attention:
    """The attention of a model, averaged over its layers."""
    part = text_part(facts)
    if part.get("o_lora_rank") and part.get("q_lora_rank"):
        return _deepseek_v4(facts, part)
    full = _mla(facts, part) if part.get("kv_lora_rank") else _gqa(facts, part)
    if linear := _linear_layers(facts, part):
        return _mixed(full, _delta_net(facts, part), linear / facts.layers)
    return full


def _mla(facts: ModelFacts, part: Mapping[str, Any]) -> Attention:
    heads, hidden = facts.heads, facts.hidden
    latent, rope = part["kv_lora_rank"], part.get("qk_rope_head_dim", _ROPE)
    nope = part.get("qk_nope_head_dim", 128)
    value, query = part.get("v_head_dim", 128), part.get("q_lora_rank")
    sliced = heads * (nope + rope) * (query or hidden) + latent * heads * (nope + value) + heads * value * hidden
    replicated = hidden * (latent + rope) + (hidden * query if query else 0)
    index_heads, selected, keys = part.get("index_n_heads"), part.get("index_topk") or 0, 0.0
    if index_heads:
        width, kinds = part.get("index_head_dim", 128), part.get("indexer_types")
        share = kinds.count("full") / len(kinds) if kinds else 1  # GLM-5.2: most layers use the indexer of another
        replicated += share * ((query or hidden) * index_heads * width + hidden * (width + index_heads))
        keys = share * INDEXER_KEY_BYTES
    is_sparse = bool(index_heads and selected)
    cache = float(latent_bytes(facts.config, latent, rope, is_sparse))
    times = layers_of(facts).attentions
    return Attention(
        sliced=times * sliced,
        kv=0,
        replicated=times * replicated,
        kv_heads=None,
        cache_bytes=times * (keys if is_sparse else keys + cache),
        selected_cache_bytes=times * cache if is_sparse else 0,
        selected=selected if is_sparse else 0,
    )


def _gqa(facts: ModelFacts, part: Mapping[str, Any]) -> Attention:
    head = part.get("head_dim") or facts.hidden // facts.heads
    value = part.get("v_head_dim") or head
    kv_heads = facts.kv_heads or facts.heads
    gate = 2 if part.get("attn_output_gate") or facts.family.name in ("qwen3_next", "qwen3_5_moe") else 1
    sliced = facts.hidden * facts.heads * (gate * head + value)
    kv = float(facts.hidden * kv_heads * (head + value))
    cache = kv_heads * (head + value) * value_bytes(facts.config)
    windowed = _windowed_share(facts, part)
    window = part.get("sliding_window") or part.get("sliding_window_size") or 0
    swa_heads = part.get("swa_num_key_value_heads") or kv_heads  # MiMo-V2: more KV heads where the window is short
    kv += windowed * (swa_heads / kv_heads - 1) * kv
    unknown = part.get("use_head_wise_attn_gate") or part.get("sparse_attention_config")  # Step-3.5, MiniMax-M3
    is_estimate = facts.family.name in ("step3p5", "llama4") or bool(unknown)
    return Attention(
        sliced=sliced,
        kv=kv,
        replicated=0,
        kv_heads=kv_heads,
        cache_bytes=cache * (1 - windowed),
        windowed_cache_bytes=cache * windowed * swa_heads / kv_heads,
        window=window,
        is_estimate=is_estimate,
    )


def _windowed_share(facts: ModelFacts, part: Mapping[str, Any]) -> float:
    if listed := part.get("layer_types"):
        return float(sum(kind == "sliding_attention" for kind in listed) / facts.layers)
    if listed := part.get("hybrid_layer_pattern"):  # MiMo-V2: 1 stands for a sliding window
        return float(sum(listed) / len(listed))
    return 0.0


def _linear_layers(facts: ModelFacts, part: Mapping[str, Any]) -> int:
    if kda := (part.get("linear_attn_config") or {}).get("kda_layers"):
        return len(kda)
    if not part.get("linear_num_value_heads"):
        return 0
    if listed := part.get("layer_types"):
        return sum(kind == "linear_attention" for kind in listed)
    return facts.layers - facts.layers // (part.get("full_attention_interval") or 4)


def _delta_net(facts: ModelFacts, part: Mapping[str, Any]) -> Attention:
    """Linear attention: no cache per token, and a state of fixed size for a sequence."""
    state, heads_of_state = state_bytes(part), state_heads(part)
    if kda := part.get("linear_attn_config"):
        width = kda["num_heads"] * kda["head_dim"]
        sliced = 4 * facts.hidden * width + 2 * kda["head_dim"] * width + facts.hidden * kda["num_heads"]
        replicated = 2 * facts.hidden * kda["head_dim"]
        return Attention(sliced, 0, replicated, 1, 0, state_bytes=state, state_heads=heads_of_state)
    keys = part["linear_num_key_heads"] * part["linear_key_head_dim"]
    heads = part["linear_num_value_heads"]
    values = heads * part["linear_value_head_dim"]
    sliced = facts.hidden * (2 * keys + 3 * values + 2 * heads)
    return Attention(sliced, 0, 0, 1, 0, state_bytes=state, state_heads=heads_of_state)


def _mixed(full: Attention, linear: Attention, share: float) -> Attention:
    rest = 1 - share
    return Attention(
        sliced=rest * full.sliced + share * linear.sliced,
        kv=rest * full.kv,
        replicated=rest * full.replicated + share * linear.replicated,
        kv_heads=full.kv_heads,
        cache_bytes=rest * full.cache_bytes,
        state_bytes=share * linear.state_bytes,
        state_heads=linear.state_heads,
    )


def _deepseek_v4(facts: ModelFacts, part: Mapping[str, Any]) -> Attention:
    """One KV head for all heads, low-rank query and output projections, a cache compressed by 4 or 128.

    The compressors' and the indexer's own projections are counted for the layers that have them; smaller parts (hyper
    connections) are not, so this is an estimate.
    """
    heads, hidden = facts.heads, facts.hidden
    head, query, output = part.get("head_dim", 512), part["q_lora_rank"], part["o_lora_rank"]
    groups = part.get("o_groups", 8)
    sliced = query * heads * head + heads * head * output + groups * output * hidden
    replicated = hidden * (query + head)
    ratios = part.get("compress_ratios") or ()
    entry = compressed_bytes(head, part.get("qk_rope_head_dim", _ROPE))
    cache, selected_cache = 0.0, 0.0
    for ratio in ratios[: facts.layers]:
        wide = 2 if ratio == 4 else 1
        if ratio:
            replicated += 2 * hidden * wide * head / facts.layers
        if ratio == 4:
            width = part.get("index_head_dim", 128)
            indexer = query * part.get("index_n_heads", 64) * width + hidden * part.get("index_n_heads", 64)
            replicated += (indexer + 4 * hidden * width) / facts.layers
            cache += INDEXER_KEY_BYTES / ratio / facts.layers
            selected_cache += entry / ratio / facts.layers
        elif ratio:
            cache += entry / ratio / facts.layers
    return Attention(
        sliced=sliced,
        kv=0,
        replicated=replicated,
        kv_heads=None,
        cache_bytes=cache,
        windowed_cache_bytes=entry,
        window=part.get("sliding_window", 128),
        selected_cache_bytes=selected_cache,
        selected=4 * part.get("index_topk", 512),  # of entries that stand for 4 tokens each
        is_estimate=True,
    )
