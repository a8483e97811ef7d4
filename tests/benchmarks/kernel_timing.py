"""What the kernel's benchmarks share: shapes, layers with fresh routing, cold-cache timing in CUDA graphs, ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep2tp.kernels.operands import ExpertWeights, WeightFormat
from tests.kernels.layers import FORMATS, routing, weights

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One rank's MoE layer."""

    name: str
    experts: int
    hidden: int
    inner: int
    top_k: int
    format: WeightFormat

    @property
    def key(self) -> tuple[int, int, int, int]:
        """As configs have it."""
        return self.experts, self.hidden, self.inner, self.top_k


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("dsv3-tp8", 256, 7168, 256, 8, FORMATS["fp8-128"]),
        Shape("dsv3-tp4", 256, 7168, 512, 8, FORMATS["fp8-128"]),
        Shape("dsv3-tp2", 256, 7168, 1024, 8, FORMATS["fp8-128"]),
        Shape("kimi-k2-tp8", 384, 7168, 256, 8, FORMATS["fp8-128"]),
        Shape("qwen3-235b-tp8-padded", 128, 4096, 256, 8, FORMATS["fp8-128"]),
        Shape("qwen3-235b-tp8", 128, 4096, 192, 8, FORMATS["fp8-64"]),
        Shape("glm-4.5-air-tp4-padded", 128, 4096, 384, 8, FORMATS["fp8-128"]),
        Shape("glm-4.5-air-tp4", 128, 4096, 352, 8, FORMATS["fp8-32"]),
        Shape("glm-4.5-air-tp8", 128, 4096, 176, 8, FORMATS["fp8-16"]),
        Shape("glm-4.5-tp8-bf16", 160, 5120, 192, 8, FORMATS["bf16"]),
        Shape("glm-4.5-air-tp8-bf16", 128, 4096, 176, 8, FORMATS["bf16"]),
        Shape("minimax-320", 256, 6144, 320, 8, FORMATS["fp8-64"]),
        Shape("dsv3-tp8-int4", 256, 7168, 256, 8, FORMATS["int4-32"]),
        Shape("dsv3-tp8-nvfp4", 256, 7168, 256, 8, FORMATS["nvfp4"]),
        Shape("gpt-oss-120b-tp4", 128, 2880, 720, 4, FORMATS["mxfp4"]),
    )
}


@dataclass(frozen=True)
class Batch:
    """One call's inputs."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


def make_layer(shape: Shape, seed: int = 0) -> tuple[ExpertWeights, ExpertWeights]:
    """Random weights on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    gate_up = weights(shape.format, (shape.experts, 2 * shape.inner, shape.hidden), generator)
    return gate_up, weights(shape.format, (shape.experts, shape.hidden, shape.inner), generator)


def make_batches(shape: Shape, tokens: int, seed: int = 1) -> list[Batch]:
    """Inputs of consecutive calls.

    Where few experts are hit, each call has experts that no other has; then all calls together read several times what
    the cache holds. Otherwise one call alone does, and routing is random.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    disjoint = shape.experts // (tokens * shape.top_k)
    calls = min(16, disjoint) if disjoint >= 8 else (8 if tokens <= 16 else 4)
    order = torch.randperm(shape.experts, generator=generator, device="cuda").to(torch.int32)
    batches = []
    for call in range(calls):
        x = torch.randn((tokens, shape.hidden), generator=generator, device="cuda").to(torch.bfloat16)
        weight, ids = routing(tokens, shape.experts, shape.top_k, generator)
        if disjoint >= 8:
            ids = order[call * tokens * shape.top_k :][: tokens * shape.top_k].reshape(tokens, shape.top_k).contiguous()
        batches.append(Batch(x, weight.contiguous(), ids))
    return batches


def bytes_read(gate_up: ExpertWeights, down: ExpertWeights, batches: Sequence[Batch]) -> float:
    """Bytes of weights and scales of the experts that a call hits, on average: the least that must be read."""
    tensors = [t for w in (gate_up, down) for t in (w.values, w.scales) if t is not None]
    one_expert = sum(t[0].numel() * t.element_size() for t in tensors)
    return one_expert * statistics.mean(batch.topk_ids.unique().numel() for batch in batches)


def seconds_a_call(calls: Sequence[Call], *, least_seconds: float = 0.03) -> list[float]:
    """Seconds of one call, from replays of one CUDA graph of all calls, sorted; the first is the fastest replay."""
    for call in calls[:1]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    times: list[float] = []
    while sum(times) * len(calls) < least_seconds or len(times) < 7:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes per second of a device-to-device copy, read plus written: the faster of a memory copy and a kernel's."""
    source = torch.empty(int(gigabytes * 1e9) // 2, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    ways: list[Call] = [lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target)]
    fastest = min(statistics.median(seconds_a_call([way], least_seconds=0.25)) for way in ways)
    return 2 * source.numel() * source.element_size() / fastest


def dense_flops(size: int = 8192) -> float:
    """Operations per second of a square BF16 matrix product on random data."""
    left, right = (torch.randn((size, size), device="cuda").to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    call = seconds_a_call([lambda: torch.mm(left, right, out=product)], least_seconds=0.05)
    return 2 * size**3 / statistics.median(call)
