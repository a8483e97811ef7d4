"""``torch.ops.ep2tp.fused_moe``: the layer as one operator, which torch.compile neither looks into nor breaks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields

import torch
from torch import Tensor

from ep2tp.kernels.configs import KernelConfig, PassConfig
from ep2tp.kernels.operands import Activation, ExpertWeights, WeightFormat


@torch.library.custom_op("ep2tp::fused_moe", mutates_args=())  # type: ignore[untyped-decorator]
def _fused_moe(
    x: Tensor,
    gate_up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    topk_weights: Tensor,
    topk_ids: Tensor,
    kinds: str,
    blocks: Sequence[int],
    activation: str,
    weight_on_input: bool,
    config: Sequence[int],
) -> Tensor:
    from ep2tp.kernels.fused_moe import fused_moe

    kind, other_kind = kinds.split()
    return fused_moe(
        x,
        _weights(gate_up, WeightFormat(kind, (blocks[0], blocks[1]))),  # type: ignore[arg-type]
        _weights(down, WeightFormat(other_kind, (blocks[2], blocks[3]))),  # type: ignore[arg-type]
        topk_weights,
        topk_ids,
        activation=Activation(activation),
        apply_router_weight_on_input=weight_on_input,
        config=_decoded(config),
    )


@_fused_moe.register_fake  # type: ignore[untyped-decorator]
def _(x: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def traced_fused_moe(
    x: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Activation,
    weight_on_input: bool,
    config: KernelConfig | None,
) -> Tensor:
    """:func:`ep2tp.kernels.fused_moe.fused_moe` as one operator in a graph that is being traced."""
    return _fused_moe(
        x,
        [gate_up.values, gate_up.scales, gate_up.bias, gate_up.global_scales],
        [down.values, down.scales, down.bias, down.global_scales],
        topk_weights,
        topk_ids,
        f"{gate_up.format.kind} {down.format.kind}",
        [*gate_up.format.block, *down.format.block],
        activation.value,
        weight_on_input,
        _encoded(config),
    )


def _weights(tensors: Sequence[Tensor | None], stored: WeightFormat) -> ExpertWeights:
    values, scales, bias, global_scales = tensors
    assert values is not None
    return ExpertWeights(values, scales, stored, bias, global_scales)


def _encoded(config: KernelConfig | None) -> list[int]:
    """The config's numbers, in the order of its fields; none for the default."""
    if config is None:
        return []
    tiles = [n for tile in (config.gate_up, config.down) for n in astuple(tile)]
    # No bools: torch.compile makes numbers that change from call to call symbolic, and an operator takes no mixture.
    choices = (config.by_pair, config.by_token, config.pairs, config.overlap, config.fp8_bits)
    return [*tiles, *map(int, choices)]


def _decoded(numbers: Sequence[int]) -> KernelConfig | None:
    if not numbers:
        return None
    count = len(fields(PassConfig))
    tiles = PassConfig(*numbers[:count]), PassConfig(*numbers[count : 2 * count])
    by_pair, by_token, pairs, overlap, fp8_bits = numbers[2 * count :]
    return KernelConfig(*tiles, bool(by_pair), bool(by_token), pairs, bool(overlap), bool(fp8_bits))
