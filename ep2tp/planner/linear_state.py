"""The state that linear attention keeps of a sequence: of a fixed size, however long the sequence is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ACTIVATION_BYTES = 2
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
_CONVOLUTION = 4


def state_bytes(part: Mapping[str, Any]) -> float:
    """Bytes of state of a sequence in one layer of linear attention, before slicing: recurrent and convolution state.

    As vLLM 0.33.0 (layers/mamba/mamba_utils.py: ``kda_state_shape``, ``gated_delta_net_state_shape`` and their dtypes)
    without speculative decoding: the recurrent state is FP32 for KDA, else of ``mamba_ssm_dtype``, else of 16 bits as
    the model; convolution state is of 16 bits. Not counted: what vLLM rounds a page up by, the further states that
    prefix caching keeps, and that SGLang's recurrent state is FP32 unless told otherwise. More may be held, not less.

    Args:
        part: the text model's part of a config.json that has linear attention.
    """
    if kda := part.get("linear_attn_config"):
        heads, head = kda["num_heads"], kda["head_dim"]
        kept = (kda.get("short_conv_kernel_size") or _CONVOLUTION) - 1
        return float(heads * head * head * _WIDTHS["float32"] + kept * 3 * heads * head * _ACTIVATION_BYTES)
    keys = part["linear_num_key_heads"] * part["linear_key_head_dim"]
    values = part["linear_num_value_heads"] * part["linear_value_head_dim"]
    kept = (part.get("linear_conv_kernel_dim") or _CONVOLUTION) - 1
    width = _WIDTHS.get(str(part.get("mamba_ssm_dtype")), _ACTIVATION_BYTES)
    return float(values * part["linear_key_head_dim"] * width + kept * (2 * keys + values) * _ACTIVATION_BYTES)


def state_heads(part: Mapping[str, Any]) -> int:
    """Heads of which each rank of the attention keeps the state of its own."""
    kda = part.get("linear_attn_config")
    return int(kda["num_heads"] if kda else part["linear_num_value_heads"])
