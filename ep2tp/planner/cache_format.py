"""How wide the values of a KV cache are: BF16, or FP8 where the checkpoint or the kind of attention asks for it.

Read in vLLM 0.32.0 and SGLang 0.5.17 and 0.5.23, whose ``--kv-cache-dtype`` is ``auto`` by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ep2tp.model.families import config_parts

INDEXER_KEY_BYTES = 132
"""A key of sparse attention's indexer, for a token and layer: 128 FP8 values and an FP32 scale."""


def value_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a value in the KV cache: 2 (BF16), or 1 where the checkpoint asks for FP8.

    Both engines follow ModelOpt's checkpoints (vLLM utils/torch_utils.py: ``get_kv_cache_quant_algo_string``; SGLang
    mem_cache/kv_cache_dtype.py), vLLM those of compressed-tensors, too (layers/attention/attention.py:
    ``kv_cache_scheme``); SGLang then needs ``--kv-cache-dtype fp8_e4m3``.
    """
    return 1 if any(_asks_for_fp8(part.get("quantization_config")) for part in config_parts(config)) else 2


def latent_bytes(config: Mapping[str, Any], latent: int, rope: int, is_sparse: bool) -> int:
    """Bytes of the latent of multi-head latent attention, for a token and layer.

    In FP8 sparse attention keeps rotary positions in BF16, and an FP32 scale for each 128 of the other values: 656
    bytes for 512 and 64 (vLLM v1/attention/backends/mla/flashmla_sparse.py).
    """
    width = value_bytes(config)
    if is_sparse and width == 1:
        return latent + 2 * rope + 4 * (latent // 128)
    return (latent + rope) * width


def compressed_bytes(head: int, rope: int) -> int:
    """Bytes of an entry of DeepSeek-V4's cache, always FP8 but for rotary positions, with 8 bytes of scales.

    584 for heads of 512 with 64 rotary values: vLLM models/deepseek_v4/attention.py (``fp8_ds_mla``), SGLang
    mem_cache/deepseek_v4_memory_pool.py.
    """
    return (head - rope) + 2 * rope + 8


def _asks_for_fp8(stored: Any) -> bool:
    """Whether a ``quantization_config`` names an FP8 KV cache, in ModelOpt's words or compressed-tensors'."""
    if not isinstance(stored, Mapping):
        return False
    inner = stored.get("quantization")
    for part in (stored, inner if isinstance(inner, Mapping) else {}):
        scheme = part.get("kv_cache_scheme")
        if isinstance(scheme, Mapping) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float"):
            return True
        if "FP8" in (str(scheme).upper(), str(part.get("kv_cache_quant_algo")).upper()):
            return True
    return False
