"""What the fused-MoE kernel takes: how an expert matrix is stored, and a check of every operand before a launch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from ep2tp.errors import OperandError

UNIT = 16
"""Rows and columns come in whole units of 16 values: 16 bytes of FP8, and the shortest group of any format (NVFP4)."""

Kind = Literal["bf16", "fp8", "int4", "mxfp4", "nvfp4"]
_STORED = {
    "bf16": (torch.bfloat16, torch.float16),
    "fp8": (torch.float8_e4m3fn, torch.uint8),
    "int4": (torch.int32, torch.uint8),
    "mxfp4": (torch.uint8,),
    "nvfp4": (torch.uint8,),
}
_SCALES = {
    "fp8": (torch.float32,),
    "int4": (torch.bfloat16, torch.float16, torch.float32),
    "mxfp4": (torch.uint8, torch.float8_e8m0fnu),
    "nvfp4": (torch.float8_e4m3fn, torch.uint8),
}


class Activation(StrEnum):
    """What joins gate and up.

    SILU: ``silu(gate) * up``, the gate's I rows before up's.
    SWIGLU_OAI: gpt-oss: ``g * sigmoid(1.702 g) * (u + 1)`` with g at most 7 and u within ±7; rows of gate and up
    alternate, as gpt-oss' checkpoints and vLLM's ``swigluoai`` have them.
    SWIGLU_OAI_SPLIT: the same function, gate's rows before up's (vLLM's ``swigluoai_uninterleave``).
    """

    SILU = "silu"
    SWIGLU_OAI = "swiglu_oai"
    SWIGLU_OAI_SPLIT = "swiglu_oai_split"

    @property
    def interleaved(self) -> bool:
        """Whether rows of gate and up alternate."""
        return self is Activation.SWIGLU_OAI


@dataclass(frozen=True)
class WeightFormat:
    """How an expert's ``[rows, columns]`` matrix is stored.

    Attributes:
        kind: ``bf16`` (also FP16), ``fp8`` (E4M3), ``int4`` (offset 8, compressed-tensors' packing: value j of a row is
            bits 4j of its little-endian int32 words), ``mxfp4`` (E2M1 pairs, low nibble first; E8M0 scales), ``nvfp4``
            (E2M1 pairs; E4M3 scales times one FP32 number an expert).
        block: ``(rows, columns)`` that share a scale; 0 means all of them: ``(128, 128)``, per channel ``(1, 0)``, per
            tensor ``(0, 0)``, groups ``(1, 32)``. Ignored for ``bf16``.
    """

    kind: Kind
    block: tuple[int, int] = (0, 0)

    @property
    def values_per_byte(self) -> int:
        """2 for the 4-bit formats, else 1."""
        return 2 if self.kind in ("int4", "mxfp4", "nvfp4") else 1

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of one expert's scales; a last, partly filled block has one."""
        return tuple(-(-size // block) if block else 1 for size, block in zip((rows, columns), self.block, strict=True))  # type: ignore[return-value]

    def __str__(self) -> str:
        return self.kind if self.kind == "bf16" else f"{self.kind}-{self.block[0]}x{self.block[1]}"


@dataclass(frozen=True)
class ExpertWeights:
    """One matrix of every expert.

    Attributes:
        values: ``[E, rows, columns]``; packed formats hold ``columns / 2`` bytes, or ``columns / 8`` int32.
        scales: ``[E, *format.scale_shape(rows, columns)]``, None for ``bf16``. FP8: float32. INT4: floating point.
            MXFP4: E8M0. NVFP4: E4M3.
        format: how values are stored.
        bias: ``[E, rows]`` of any floating-point dtype.
        global_scales: NVFP4 only: float32 ``[E]``, multiplied with ``scales``.
    """

    values: Tensor
    scales: Tensor | None
    format: WeightFormat
    bias: Tensor | None = None
    global_scales: Tensor | None = None

    @property
    def columns(self) -> int:
        """Logical columns: the matrix's input features."""
        values_per_element = self.format.values_per_byte * (
            self.values.element_size() if self.format.kind != "bf16" else 1
        )
        return int(self.values.shape[2]) * values_per_element


def check_operands(
    x: Tensor, gate_up: ExpertWeights, down: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None
) -> None:
    """Raise :class:`OperandError`, which names the operand and its values, if the kernel cannot take them."""
    _require(x.ndim == 2 and x.dtype in (torch.bfloat16, torch.float16), "x", x, "bf16 or fp16 [M, K]")
    tokens, hidden = x.shape
    _require(x.stride(1) == 1 or tokens == 0, "x", x, "contiguous rows (stride 1 in K)")
    _require(gate_up.values.ndim == 3, "gate_up.values", gate_up.values, "three dimensions [E, 2I, K]")
    experts, rows, _ = gate_up.values.shape
    inner = rows // 2
    _require(
        rows == 2 * inner and inner % UNIT == 0 and inner > 0,
        "gate_up.values",
        gate_up.values,
        f"2I rows, where I is a multiple of {UNIT}",
    )
    _require(hidden % UNIT == 0 and hidden > 0, "x", x, f"K, a multiple of {UNIT}")
    _check_weights("gate_up", gate_up, (experts, rows, hidden), x)
    _check_weights("down", down, (experts, hidden, inner), x)
    _require(
        gate_up.format.kind == down.format.kind,
        "down.format",
        str(down.format),
        f"the kind of gate_up ({gate_up.format})",
    )
    _require(
        topk_ids.ndim == 2 and topk_ids.shape[0] == tokens and topk_ids.dtype in (torch.int32, torch.int64),
        "topk_ids",
        topk_ids,
        f"int32 or int64 [{tokens}, top_k]",
    )
    _require(
        topk_weights.shape == topk_ids.shape and topk_weights.dtype == torch.float32,
        "topk_weights",
        topk_weights,
        f"float32 {list(topk_ids.shape)}",
    )
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        _require(tensor.is_contiguous(), name, tensor, "contiguous")
    if out is not None:
        _require(
            out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous(),
            "out",
            out,
            f"contiguous {x.dtype} {list(x.shape)}",
        )
    tensors = [x, topk_ids, topk_weights, out]
    for weights in (gate_up, down):
        tensors += [weights.values, weights.scales, weights.bias, weights.global_scales]
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    _require(len(devices) == 1, "operands", ", ".join(sorted(devices)), "one device for all of them")


def _check_weights(name: str, weights: ExpertWeights, shape: tuple[int, int, int], x: Tensor) -> None:
    kind, block = weights.format.kind, weights.format.block
    values, scales = weights.values, weights.scales
    _require(values.dtype in _STORED[kind], f"{name}.values", values, f"one of {_STORED[kind]} for {kind}")
    stored = (*values.shape[:2], weights.columns)
    _require(stored == shape, f"{name}.values", values, f"{list(shape)} values")
    _require(values.is_contiguous(), f"{name}.values", values, "contiguous")
    if kind == "bf16":
        _require(values.dtype == x.dtype, f"{name}.values", values, f"x's dtype, {x.dtype}")
        _require(scales is None, f"{name}.scales", scales, "none for bf16")
    else:
        _check_block(name, kind, block)
        expected = [shape[0], *weights.format.scale_shape(shape[1], shape[2])]
        _require(
            scales is not None and list(scales.shape) == expected,
            f"{name}.scales",
            scales,
            f"{expected} for {weights.format}",
        )
        assert scales is not None
        _require(scales.dtype in _SCALES[kind], f"{name}.scales", scales, f"one of {_SCALES[kind]}")
        _require(scales.is_contiguous(), f"{name}.scales", scales, "contiguous")
    is_nvfp4 = kind == "nvfp4"
    global_scales = weights.global_scales
    _require(
        (global_scales is not None) == is_nvfp4,
        f"{name}.global_scales",
        global_scales,
        "given for nvfp4 and only there",
    )
    if global_scales is not None:
        _require(
            global_scales.dtype == torch.float32 and global_scales.shape == (shape[0],),
            f"{name}.global_scales",
            global_scales,
            f"float32 [{shape[0]}]",
        )
    if weights.bias is not None:
        _require(
            weights.bias.shape == shape[:2] and weights.bias.is_floating_point() and weights.bias.is_contiguous(),
            f"{name}.bias",
            weights.bias,
            f"contiguous floating point {list(shape[:2])}",
        )


def _check_block(name: str, kind: str, block: tuple[int, int]) -> None:
    is_power = block[1] & (block[1] - 1) == 0
    groups = {
        "int4": block[0] == 1 and block[1] >= 32 and is_power,
        "mxfp4": block == (1, 32),
        "nvfp4": block == (1, 16),
    }
    fits = groups.get(kind, block[0] >= 0 and block[1] % UNIT == 0 and is_power)
    _require(
        fits, f"{name}.format.block", str(block), f"a block that {kind} has, its columns a power of two, {UNIT} or more"
    )


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if holds:
        return
    if isinstance(value, Tensor):
        value = f"{value.dtype} {list(value.shape)} with strides {list(value.stride())}"
    raise OperandError(f"fused_moe: {name} is {value}; it takes {expected}.")
