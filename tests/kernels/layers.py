"""Random MoE layers in every format, made of stored bytes: the reference dequantises what the kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep2tp.kernels.operands import ExpertWeights, WeightFormat

FP8 = WeightFormat("fp8", (128, 128))
FORMATS = {
    "bf16": WeightFormat("bf16"),
    "fp8-128": FP8,
    "fp8-64": WeightFormat("fp8", (64, 64)),
    "fp8-32": WeightFormat("fp8", (32, 32)),
    "fp8-16": WeightFormat("fp8", (16, 16)),
    "fp8-channel": WeightFormat("fp8", (1, 0)),
    "fp8-tensor": WeightFormat("fp8", (0, 0)),
    "int4-32": WeightFormat("int4", (1, 32)),
    "int4-128": WeightFormat("int4", (1, 128)),
    "mxfp4": WeightFormat("mxfp4", (1, 32)),
    "nvfp4": WeightFormat("nvfp4", (1, 16)),
}


@dataclass(frozen=True)
class MoeLayer:
    """Weights and one batch of inputs."""

    x: Tensor
    gate_up: ExpertWeights
    down: ExpertWeights
    topk_weights: Tensor
    topk_ids: Tensor

    @property
    def operands(self) -> tuple[Tensor, ExpertWeights, ExpertWeights, Tensor, Tensor]:
        """In the order that the kernel and its reference take them."""
        return self.x, self.gate_up, self.down, self.topk_weights, self.topk_ids


def weights(
    stored: WeightFormat,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
) -> ExpertWeights:
    """Values of about unit variance divided by the square root of the columns, on the generator's device."""
    experts, rows, columns = shape
    device = generator.device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator, device=device)

    biases = normal(experts, rows).to(dtype) if bias else None
    if stored.kind == "bf16":
        values = torch.empty(shape, dtype=dtype, device=device)
        for expert in range(experts):
            values[expert] = (normal(rows, columns) / columns**0.5).to(dtype)
        return ExpertWeights(values, None, stored, biases)
    scale_shape = (experts, *stored.scale_shape(rows, columns))
    near_one = torch.exp2(integers(-8, 9, *scale_shape).float() / 8)  # scales that differ by up to four times
    if stored.kind == "fp8":
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        for expert in range(experts):
            values[expert] = (normal(rows, columns) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        return ExpertWeights(values, near_one / (60 * columns**0.5), stored, biases)
    packed = integers(0, 256, experts, rows, columns // 2).to(torch.uint8)
    if stored.kind == "int4":
        return ExpertWeights(packed.view(torch.int32), (near_one / (4.6 * columns**0.5)).to(dtype), stored, biases)
    if stored.kind == "mxfp4":
        exponents = integers(125, 130, *scale_shape) - round(torch.log2(torch.tensor(2.9 * columns**0.5)).item())
        return ExpertWeights(packed, exponents.to(torch.uint8), stored, biases)
    expert_scales = (1 + torch.arange(experts, device=device) % 3) / (2.9 * columns**0.5 * 64)
    return ExpertWeights(packed, (near_one * 64).to(torch.float8_e4m3fn), stored, biases, expert_scales)


def routing(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Router weights that sum to 1, and distinct ids where there are enough experts (otherwise they repeat)."""
    scores = torch.rand((tokens, max(experts, top_k)), generator=generator, device=generator.device)
    weight, ids = scores.topk(top_k, dim=-1)
    return weight / weight.sum(-1, keepdim=True), (ids % experts).to(torch.int32)


def layer(
    stored: WeightFormat,
    *,
    tokens: int,
    hidden: int = 256,
    inner: int = 128,
    experts: int = 4,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> MoeLayer:
    """One random layer and batch."""
    generator = torch.Generator(device).manual_seed(seed)
    gate_up = weights(stored, (experts, 2 * inner, hidden), generator, dtype=dtype, bias=bias)
    down = weights(stored, (experts, hidden, inner), generator, dtype=dtype, bias=bias)
    x = torch.randn((tokens, hidden), generator=generator, device=device).to(dtype)
    return MoeLayer(x, gate_up, down, *routing(tokens, experts, top_k, generator))


def relative_error(result: Tensor, reference: Tensor) -> float:
    """``‖result - reference‖ / ‖reference‖``; NaN if any is NaN."""
    reference = reference.double()
    return float((result.double() - reference).norm() / reference.norm())
