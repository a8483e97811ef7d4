"""Names of packed number types, which SGLang's quantisation methods look up when they are imported.

The names are those of vLLM's and SGLang's ``scalar_type.py`` (Apache-2.0): sign, bits, ``b`` and the offset that is
added to stored values, or exponent and mantissa bits.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScalarType:
    """One number type."""

    name: str
    size_bits: int
    bias: int = 0


class scalar_types:
    """All of them."""

    uint4 = ScalarType("uint4", 4)
    uint8 = ScalarType("uint8", 8)
    uint4b8 = ScalarType("uint4b8", 4, 8)
    uint8b128 = ScalarType("uint8b128", 8, 128)
    float4_e2m1f = ScalarType("float4_e2m1f", 4)
    float8_e4m3fn = ScalarType("float8_e4m3fn", 8)
    float8_e5m2 = ScalarType("float8_e5m2", 8)
