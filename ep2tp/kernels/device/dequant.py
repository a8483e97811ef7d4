"""Device functions that turn stored weights and scales into float32. Every stored value is exact in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_value(stored, BITS: tl.constexpr):
    """E4M3 bytes. ``BITS``: by integer arithmetic, for GPUs that have no conversion (before SM89)."""
    if BITS:
        # Sign to bit 31 and copies of it below, which are cut off; the other seven bits to 20-26. Read as float32, that
        # is the value times 2**-120, subnormals too: the exponent's bias is 127 there and 7 in E4M3.
        bits = ((stored.to(tl.int32) << 24) >> 4) & -2014314496  # 0x87F00000
        value = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2**120
        value = tl.where((stored & 127) == 127, float("nan"), value)
    else:
        value = stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return value


@triton.jit
def fp4_value(nibble):
    """E2M1 in the low four bits of int32: as in :func:`fp8_value`, with biases of 127 and 1."""
    bits = ((nibble & 8) << 28) | ((nibble & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 85070591730234615865843651857942052864.0  # 2**126


@triton.jit
def nibble_values(stored, KIND: tl.constexpr):
    """Bytes of two 4-bit values: those of the even columns (low nibbles), and those of the odd."""
    low, high = (stored & 15).to(tl.int32), (stored >> 4).to(tl.int32)
    if KIND == "int4":
        low, high = (low - 8).to(tl.float32), (high - 8).to(tl.float32)
    else:
        low, high = fp4_value(low), fp4_value(high)
    return low, high


@triton.jit
def byte_values(stored, KIND: tl.constexpr, BITS: tl.constexpr):
    """BF16, FP16 or FP8 values."""
    if KIND == "fp8":
        value = fp8_value(stored, BITS)
    else:
        value = stored.to(tl.float32)
    return value


@triton.jit
def scale_value(stored, KIND: tl.constexpr, BITS: tl.constexpr):
    """Scales: E8M0 for MXFP4, E4M3 for NVFP4, floating point otherwise."""
    if KIND == "mxfp4":
        bits = stored.to(tl.int32)
        exponent = tl.where(bits == 0, 1 << 22, bits << 23)  # 2**-127 is subnormal in float32
        value = tl.where(bits == 255, float("nan"), exponent.to(tl.float32, bitcast=True))
    elif KIND == "nvfp4":
        value = fp8_value(stored, BITS)
    else:
        value = stored.to(tl.float32)
    return value
