"""A MoE layer's experts as an engine loaded them, in the form that ep2tp's kernel takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ep2tp.errors import Ep2tpError, OperandError

if TYPE_CHECKING:
    from ep2tp.kernels.operands import Activation, ExpertWeights

DEVICES = {"cuda"}
"""Kinds of devices that ep2tp's kernel runs on."""


class UnfitError(Ep2tpError):
    """A layer that ep2tp's kernel does not take; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of one MoE layer.

    Attributes:
        gate_up: [E, 2I, K], a gate's rows before its up projection's.
        down: [E, K, I].
        activation: what is between them.
        top_k: experts of a token.
        weighs_input: whether a token's router weight goes onto its input instead of its output.
    """

    gate_up: ExpertWeights
    down: ExpertWeights
    activation: Activation
    top_k: int
    weighs_input: bool = False

    @property
    def key(self) -> tuple[int, int, int, int]:
        """(E, K, I, top_k), by which tables of configurations are looked up."""
        count, hidden, size = self.down.values.shape
        return count, hidden, size, self.top_k

    def check(self, dtype: Any) -> None:
        """Whether the kernel takes these weights with activations of ``dtype``.

        Raises:
            UnfitError: it does not.
        """
        import torch

        from ep2tp.kernels.operands import check_operands

        values = self.gate_up.values
        if values.device.type not in DEVICES or torch.version.hip:
            raise UnfitError(f"ep2tp's kernel runs on NVIDIA GPUs, and the weights are on {values.device}")
        x = values.new_empty((0, self.down.values.shape[1]), dtype=dtype)
        ids = values.new_empty((0, self.top_k), dtype=torch.int32)
        try:
            check_operands(x, self.gate_up, self.down, ids.float(), ids, None)
        except OperandError as error:
            raise UnfitError(str(error)) from None

    def __str__(self) -> str:
        """The shape and the format, for a log."""
        count, hidden, size, top_k = self.key
        return f"E={count} K={hidden} I={size} top {top_k} {self.gate_up.format}"


def expert_weights(values: Any, scales: Any, block: Sequence[int] | None, bias: Any = None) -> ExpertWeights:
    """One matrix of all experts, from the tensors of an engine's Triton kernels.

    Args:
        values: [E, rows, columns], 16-bit floats or FP8 E4M3.
        scales: F32: one for each block, [E, rows / block, columns / block]; for each row, [E, rows, 1] or [E, rows];
            or for each expert, [E] or [E, 1, 1]; None for floats.
        block: rows and columns that share a scale, where blocks do.
        bias: [E, rows], or None.

    Raises:
        UnfitError: the values are of another type.
    """
    import torch

    from ep2tp.kernels.operands import ExpertWeights, WeightFormat

    experts, rows, _ = values.shape
    if scales is None:
        return ExpertWeights(values, None, WeightFormat("bf16"), bias)
    if values.dtype is not torch.float8_e4m3fn:
        raise UnfitError(f"the weights are {values.dtype}".replace("torch.", ""))
    if block is not None:
        return ExpertWeights(values, scales, WeightFormat("fp8", (block[0], block[1])), bias)
    if scales.numel() == experts * rows:
        return ExpertWeights(values, scales.view(experts, rows, 1), WeightFormat("fp8", (1, 0)), bias)
    if scales.numel() == experts:
        return ExpertWeights(values, scales.view(experts, 1, 1), WeightFormat("fp8", (0, 0)), bias)
    raise UnfitError(f"scales of shape {list(scales.shape)} are neither one a row nor one an expert")
