"""Element types of safetensors files (https://github.com/huggingface/safetensors, ``enum Dtype``) and their sizes."""

from __future__ import annotations

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of one element, by the type's name."""


def item_bytes(dtype: str) -> int:
    """Bytes of one element; 1 for types that pack several into a byte."""
    return max(1, BITS[dtype] // 8)
