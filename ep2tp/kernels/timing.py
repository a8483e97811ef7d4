"""Times a call on a GPU as it runs in a decode step: in a CUDA graph, with cold caches and fresh routing each time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ep2tp.errors import OperandError

_REPEATS = 12
_COLD = 256 << 20  # bytes that are written before each call: more than the L2 of any GPU


class Routing:
    """Uniformly random experts for each of some tokens, none twice for one token, on the default device.

    Attributes:
        weights: [M, top_k] FP32, each row's sum is 1.
        ids: [M, top_k] int32.
    """

    def __init__(self, tokens: int, experts: int, top_k: int) -> None:
        self._experts = experts
        self.weights = torch.full((tokens, top_k), 1 / top_k)
        self.ids = torch.zeros((tokens, top_k), dtype=torch.int32)
        self.renew()

    def renew(self) -> None:
        """Draw other experts, in place."""
        chances = torch.rand((self.ids.shape[0], self._experts), device=self.ids.device)
        self.ids.copy_(chances.topk(self.ids.shape[1]).indices)


def milliseconds(call: Callable[[], Any], routing: Routing) -> float:
    """The median time of a call that reads ``routing``.

    Raises:
        RuntimeError: the call does not run.
    """
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cold = torch.empty(_COLD, dtype=torch.int8, device="cuda")
    samples = []
    for _ in range(_REPEATS):
        routing.renew()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()  # takes longer than the next lines, so that the GPU never waits for them
        start.record()
        graph.replay()
        end.record()
        samples.append((start, end))
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in samples))


def random_weights(shape: tuple[int, int, int], is_fp8: bool) -> Tensor:
    """[E, rows, columns] BF16 or FP8 E4M3 on the default device, finite and small."""
    if not is_fp8:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05)
    bits = torch.empty(shape, dtype=torch.uint8).random_(0, 0x60)
    return bits.view(torch.float8_e4m3fn)


def triton_version() -> str:
    """Of the Triton that compiles the kernels here; SGLang keeps files by it."""
    import triton

    return str(triton.__version__)


def launch_errors() -> tuple[type[Exception], ...]:
    """What a configuration raises that does not compile, or needs more than the GPU has."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, PTXASError, OutOfResources, OperandError, AssertionError, ValueError
