"""Quantisation formats: how the values of one [rows, columns] matrix are stored as checkpoint tensors.

A projection's logical matrix is ``[output rows, input columns]``. A format says, for each stored tensor of the matrix
(*component*), on which axis rows and columns lie and how many logical values one stored element stands for. That is all
that slicing and padding need. Sources of the layouts: DeepSeek-V3 README_WEIGHTS.md; compressed-tensors 0.17
(PackedQuantizationCompressor); ModelOpt's exported checkpoints; OCP Microscaling (MX) 1.0; AutoAWQ; GPTQ v1; the
parameter definitions of vLLM 0.33.0 for each.

A new format is one function here that returns a :class:`Format`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import lcm

FLOAT_DTYPES = ("F32", "F16", "BF16")
WEIGHT_SUFFIXES = frozenset({".weight", ".weight_packed", ".qweight", "_blocks", ""})
"""What follows a module's name in the names of its weights, in any format; all else are scales, biases and numbers."""


class Fill(StrEnum):
    """What an element of padding holds."""

    ZERO = "zero"  # all bits zero
    ONE = "one"  # 1.0 in the tensor's dtype; E8M0 exponents stored as U8 too
    INT4_ZERO = "int4-zero"  # packed with an offset of 8: zero is nibble 8
    INT8_ZERO = "int8-zero"  # packed with an offset of 128: zero is byte 128
    INT4_POINT = "int4-point"  # GPTQ v1 stores zero points less one: nibble 7 for an offset of 8
    INT8_POINT = "int8-point"  # the same: byte 127 for an offset of 128
    GROUP_INDEX = "group-index"  # each column's own number divided by the group size
    SHAPE = "shape"  # not padded: the two values are the logical shape, and are rewritten


@dataclass(frozen=True)
class Dim:
    """Where a logical dimension lies in a stored tensor.

    Attributes:
        axis: axis counted from the end (-1 is the last), so that leading expert axes do not matter.
        per: logical values per stored element: 1 for plain weights, 2 for packed FP4, 128 for FP8 block scales.
    """

    axis: int
    per: int = 1

    def stored(self, size: int) -> int:
        """Stored elements for ``size`` logical values; a last, partly filled element counts."""
        return -(-size // self.per)


@dataclass(frozen=True)
class Component:
    """One stored tensor of a matrix.

    Attributes:
        suffix: what follows the module name in the tensor's name, such as ``.weight_scale_inv``.
        rows: the output dimension, or None where the tensor has one value for all rows.
        cols: the input dimension, or None.
        fill: what padding holds.
        ndim: axes without the leading expert axis of a fused tensor.
        dtypes: safetensors dtypes that it may have.
    """

    suffix: str
    rows: Dim | None
    cols: Dim | None
    dtypes: tuple[str, ...]
    fill: Fill = Fill.ZERO
    ndim: int = 2

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all of it."""
        return self.rows is None and self.cols is None


@dataclass(frozen=True)
class Format:
    """How one matrix is stored.

    Attributes:
        name: the name used in logs, patches and documents.
        bits: bits of one weight value.
        row_block: rows that share one scale; a slice of rows must be a multiple of it.
        col_block: columns that share one scale or one packed element.
        components: the stored tensors. The first holds the weights.
        required: tensors without which the weights mean nothing, each as the suffixes that it may have.
        refused: suffixes that ep2tp cannot slice, with the reason.
    """

    name: str
    bits: int
    row_block: int
    col_block: int
    components: tuple[Component, ...]
    required: tuple[tuple[str, ...], ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def block(self) -> int:
        """The least run of intermediate values that no slice may cut: they are rows of gate and up, columns of down."""
        return lcm(self.row_block, self.col_block)

    @property
    def padded_block(self) -> int:
        """The block to use once padding is needed anyway: whole blocks, and 16 bytes a row for vector loads."""
        return lcm(self.block, 16 * 8 // self.bits)

    def component(self, suffix: str) -> Component | None:
        """The component stored under ``suffix``, or None."""
        return next((c for c in self.components if c.suffix == suffix), None)


ROWS, COLS = Dim(-2), Dim(-1)
_BIASES = (
    Component(".bias", Dim(-1), None, FLOAT_DTYPES, ndim=1),
    Component("_bias", Dim(-1), None, FLOAT_DTYPES, ndim=1),
)

PLAIN = Format(
    "bf16",
    bits=16,
    row_block=1,
    col_block=1,
    components=(
        Component(".weight", ROWS, COLS, FLOAT_DTYPES),
        Component("", ROWS, COLS, FLOAT_DTYPES),
        *_BIASES,
    ),
)


def fp8_block(rows: int = 128, cols: int = 128) -> Format:
    """FP8 E4M3 with one scale for each ``rows`` x ``cols`` block; scales are F32, BF16 or E8M0."""
    scale = {"rows": Dim(-2, rows), "cols": Dim(-1, cols), "dtypes": ("F32", "BF16", "F8_E8M0"), "fill": Fill.ONE}
    return Format(
        f"fp8_block{rows}" if rows == cols else f"fp8_block{rows}x{cols}",
        bits=8,
        row_block=rows,
        col_block=cols,
        components=(
            Component(".weight", ROWS, COLS, ("F8_E4M3",)),
            Component(".weight_scale_inv", **scale),  # type: ignore[arg-type]
            Component(".weight_scale", **scale),  # type: ignore[arg-type]
            Component(".scale", **scale),  # type: ignore[arg-type]
            Component("", ROWS, COLS, ("F8_E4M3",)),
            Component("_scale_inv", **scale),  # type: ignore[arg-type]
            Component("_weight_scale", **scale),  # type: ignore[arg-type]
            *_BIASES,
        ),
        required=((".weight_scale_inv", ".weight_scale", ".scale", "_scale_inv", "_weight_scale"),),
    )


def fp8_channel() -> Format:
    """FP8 E4M3 with one F32 scale for each output row (compressed-tensors, strategy ``channel``)."""
    return Format(
        "fp8_channel",
        bits=8,
        row_block=1,
        col_block=1,
        components=(
            Component(".weight", ROWS, COLS, ("F8_E4M3",)),
            Component(".weight_scale", ROWS, None, ("F32", "BF16", "F16"), Fill.ONE),
            *_BIASES,
        ),
        required=((".weight_scale",),),
    )


def fp8_tensor() -> Format:
    """FP8 E4M3 with one scale for the whole matrix."""
    return Format(
        "fp8_tensor",
        bits=8,
        row_block=1,
        col_block=1,
        components=(
            Component(".weight", ROWS, COLS, ("F8_E4M3",)),
            *(Component(s, None, None, FLOAT_DTYPES, ndim=0) for s in (".weight_scale", ".input_scale")),
            *_BIASES,
        ),
        required=((".weight_scale",),),
    )


def int_packed(bits: int, group: int) -> Format:
    """INT4 or INT8 packed into I32 along the columns, one scale a row and ``group`` columns (compressed-tensors)."""
    per_word = 32 // bits
    return Format(
        f"int{bits}_g{group}",
        bits=bits,
        row_block=1,
        col_block=lcm(group, per_word),
        components=(
            Component(
                ".weight_packed",
                ROWS,
                Dim(-1, per_word),
                ("I32",),
                Fill.INT4_ZERO if bits == 4 else Fill.INT8_ZERO,
            ),
            Component(".weight_scale", ROWS, Dim(-1, group), FLOAT_DTYPES, Fill.ONE),
            Component(".weight_shape", None, None, ("I64", "I32"), Fill.SHAPE, ndim=1),
            *_BIASES,
        ),
        required=((".weight_scale",),),
        refused={
            ".weight_g_idx": "activation-ordered groups (actorder) scatter a group over all columns",
            ".weight_zero_point": "asymmetric zero points are packed along the rows",
        },
    )


def nvfp4() -> Format:
    """NVFP4: E2M1 packed two a byte, an E4M3 scale each 16 columns, F32 scalars (ModelOpt and compressed-tensors)."""
    scalars = (".weight_scale_2", ".input_scale", ".weight_global_scale", ".input_global_scale")
    return Format(
        "nvfp4",
        bits=4,
        row_block=1,
        col_block=16,
        components=(
            Component(".weight", ROWS, Dim(-1, 2), ("U8",)),
            Component(".weight_packed", ROWS, Dim(-1, 2), ("U8",)),
            Component(".weight_scale", ROWS, Dim(-1, 16), ("F8_E4M3",), Fill.ONE),
            *(Component(s, None, None, ("F32",), ndim=0) for s in scalars),
            *_BIASES,
        ),
        required=((".weight_scale",), (".weight_scale_2", ".weight_global_scale")),
    )


def mxfp4() -> Format:
    """MXFP4: E2M1 packed two a byte and an E8M0 exponent each 32 columns, in the four ways checkpoints store it.

    ``.weight`` + ``.scale`` (DeepSeek-V4), ``.weight_packed`` + ``.weight_scale`` (compressed-tensors, Kimi-K3), and
    ``_blocks`` ``[rows, columns/32, 16]`` + ``_scales`` (gpt-oss).
    """
    exponents = ("U8", "F8_E8M0")
    return Format(
        "mxfp4",
        bits=4,
        row_block=1,
        col_block=32,
        components=(
            Component(".weight", ROWS, Dim(-1, 2), ("I8", "U8")),
            Component(".weight_packed", ROWS, Dim(-1, 2), ("U8",)),
            Component("_blocks", Dim(-3), Dim(-2, 32), ("U8",), ndim=3),
            Component(".scale", ROWS, Dim(-1, 32), exponents, Fill.ONE),
            Component(".weight_scale", ROWS, Dim(-1, 32), exponents, Fill.ONE),
            Component("_scales", ROWS, Dim(-1, 32), exponents, Fill.ONE),
            *_BIASES,
        ),
        required=((".scale", ".weight_scale", "_scales"),),
    )


def mxfp8() -> Format:
    """MXFP8: E4M3 values and an E8M0 exponent each 32 columns."""
    return Format(
        "mxfp8",
        bits=8,
        row_block=1,
        col_block=32,
        components=(
            Component(".weight", ROWS, COLS, ("F8_E4M3",)),
            Component(".weight_scale", ROWS, Dim(-1, 32), ("U8", "F8_E8M0"), Fill.ONE),
            Component(".weight_scale_inv", ROWS, Dim(-1, 32), ("U8", "F8_E8M0"), Fill.ONE),
            *_BIASES,
        ),
        required=((".weight_scale", ".weight_scale_inv"),),
    )


def awq(bits: int, group: int) -> Format:
    """AWQ: ``qweight [columns, rows/8]``, zero points and scales each ``group`` columns; all transposed."""
    per_word = 32 // bits
    return Format(
        f"awq_int{bits}_g{group}",
        bits=bits,
        row_block=per_word,
        col_block=group,
        components=(
            Component(".qweight", Dim(-1, per_word), Dim(-2), ("I32",)),
            Component(".qzeros", Dim(-1, per_word), Dim(-2, group), ("I32",)),
            Component(".scales", Dim(-1), Dim(-2, group), FLOAT_DTYPES, Fill.ONE),
            *_BIASES,
        ),
        required=((".qzeros",), (".scales",)),
    )


def gptq(bits: int, group: int, version: int = 1) -> Format:
    """GPTQ: ``qweight [columns/8, rows]``, zero points and scales each ``group`` columns.

    Version 1 stores zero points less one. Padding is zero both to kernels that read the zero points and to those that
    take symmetric checkpoints to be offset by half the range (Marlin).
    """
    per_word = 32 // bits
    zero = Fill.INT4_ZERO if bits == 4 else Fill.INT8_ZERO
    point = zero if version == 2 else Fill.INT4_POINT if bits == 4 else Fill.INT8_POINT
    return Format(
        f"gptq_int{bits}_g{group}",
        bits=bits,
        row_block=per_word,
        col_block=lcm(group, per_word),
        components=(
            Component(".qweight", Dim(-1), Dim(-2, per_word), ("I32",), zero),
            Component(".qzeros", Dim(-1, per_word), Dim(-2, group), ("I32",), point),
            Component(".scales", Dim(-1), Dim(-2, group), FLOAT_DTYPES, Fill.ONE),
            Component(".g_idx", None, Dim(-1), ("I32",), Fill.GROUP_INDEX, ndim=1),
            *_BIASES,
        ),
        required=((".qzeros",), (".scales",)),
    )
