"""Compiles what a call would launch, for any GPU, without one: arguments have no data, and a driver is stood in for.

It leaves Triton's own cache filled, which lets several processes compile what one will then run.
"""

from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "the interpreter compiles nothing"

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from ep2tp.kernels import launch
from ep2tp.kernels.configs import KernelConfig
from ep2tp.kernels.fused_moe import fused_moe
from ep2tp.kernels.operands import Activation, ExpertWeights, WeightFormat

KERNELS = ("gate_up_by_pair", "gate_up_by_expert", "down_by_token", "down_by_expert", "combine")


@dataclass(frozen=True)
class Launch:
    """One launch of a call: its kernel, grid, arguments and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.fn.__name__)

    def compile(self) -> Any:
        """What Triton compiles for the active driver's GPU."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.options)


class OfflineDriver:
    """Stands in for a GPU of one compute capability (90 for SM90) while kernels are compiled."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_stream(self, _device: int) -> int:
        return 0


def pretend(capability: int) -> None:
    """Compile for this compute capability from now on, in this process."""
    triton.runtime.driver.set_active(OfflineDriver(capability))
    for name in KERNELS:
        getattr(launch, name).device_caches.clear()


def launches(
    config: KernelConfig, stored: WeightFormat, shape: tuple[int, int, int, int], tokens: int,
    dtype: torch.dtype = torch.bfloat16, bias: bool = False, activation: Activation = Activation.SILU,
) -> list[Launch]:  # fmt: skip
    """Each launch of one call; shape is (E, K, I, top_k)."""
    experts, hidden, inner, top_k = shape
    seen: list[Launch] = []

    def record(kernel: Any) -> Any:
        return lambda *args, grid, warmup, **options: seen.append(Launch(kernel, grid, args, options))

    with ExitStack() as stack:
        for name in KERNELS:
            kernel = getattr(launch, name)
            stack.enter_context(mock.patch.object(kernel, "run", record(kernel)))
        fused_moe(
            torch.empty((tokens, hidden), dtype=dtype, device="meta"),
            _weights(stored, (experts, 2 * inner, hidden), dtype, bias),
            _weights(stored, (experts, hidden, inner), dtype, bias),
            torch.empty((tokens, top_k), dtype=torch.float32, device="meta"),
            torch.empty((tokens, top_k), dtype=torch.int32, device="meta"),
            activation=activation,
            config=config,
        )
    return seen


def _weights(stored: WeightFormat, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> ExpertWeights:
    experts, rows, columns = shape
    kinds = {"bf16": dtype, "int4": torch.int32}
    per_element = {"int4": 8, "mxfp4": 2, "nvfp4": 2}.get(stored.kind, 1)
    stored_type = kinds.get(stored.kind, torch.uint8)
    values = torch.empty((experts, rows, columns // per_element), dtype=stored_type, device="meta")
    scales = None
    if stored.kind != "bf16":
        scale_type = {"fp8": torch.float32, "int4": dtype}.get(stored.kind, torch.uint8)
        scales = torch.empty((experts, *stored.scale_shape(rows, columns)), dtype=scale_type, device="meta")
    biases = torch.empty((experts, rows), dtype=dtype, device="meta") if bias else None
    factor = torch.empty(experts, dtype=torch.float32, device="meta") if stored.kind == "nvfp4" else None
    return ExpertWeights(values, scales, stored, biases, factor)
