"""Operands that the kernel does not take raise before a launch, and the message has their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ep2tp.errors import OperandError
from ep2tp.kernels.operands import ExpertWeights, WeightFormat, check_operands
from tests.kernels.layers import FORMATS, MoeLayer, layer


def weights(made: MoeLayer, name: str, **changes: object) -> MoeLayer:
    return replace(made, **{name: replace(getattr(made, name), **changes)})


def scales(made: MoeLayer) -> torch.Tensor:
    found = made.down.scales
    assert found is not None
    return found


Change = Callable[[MoeLayer], MoeLayer]
WRONG: dict[str, tuple[Change, str]] = {
    "x's dtype": (lambda m: replace(m, x=m.x.float()), r"x is torch.float32 \[2, 256\]"),
    "x's hidden size": (lambda m: replace(m, x=m.x[:, :240].contiguous()), r"gate_up.values is .*\[4, 256, 240\]"),
    "x's columns strided": (lambda m: replace(m, x=m.x.T.contiguous().T), r"x is .*strides \[1, 2\]"),
    "x's columns": (lambda m: replace(m, x=m.x[:, :250]), r"multiple of 16"),
    "odd rows": (lambda m: weights(m, "gate_up", values=m.gate_up.values[:, :-1]), r"gate_up.values .*2I rows"),
    "down's shape": (lambda m: weights(m, "down", values=m.down.values[:, :128]), r"down.values .*\[4, 256, 128\]"),
    "down's layout": (lambda m: weights(m, "down", values=m.down.values.transpose(1, 2)), r"down.values is"),
    "values' dtype": (
        lambda m: weights(m, "gate_up", values=m.gate_up.values.float()),
        r"gate_up.values is torch.float32",
    ),
    "no scales": (lambda m: weights(m, "down", scales=None), r"down.scales is None"),
    "scales' shape": (lambda m: weights(m, "down", scales=scales(m)[:, :1]), r"down.scales .*\[4, 4, 2\]"),
    "scales' layout": (
        lambda m: weights(m, "down", scales=scales(m).transpose(1, 2).contiguous().transpose(1, 2)),
        r"down.scales .*contiguous",
    ),
    "scales' dtype": (lambda m: weights(m, "down", scales=scales(m).half()), r"down.scales is torch.float16"),
    "block": (lambda m: weights(m, "down", format=WeightFormat("fp8", (64, 40))), r"down.format.block is \(64, 40\)"),
    "odd block": (lambda m: weights(m, "down", format=WeightFormat("fp8", (64, 48))), r"a power of two, 16 or more"),
    "kinds": (lambda m: replace(m, down=layer(FORMATS["nvfp4"], tokens=1).down), r"down.format is nvfp4"),
    "global scales": (lambda m: weights(m, "down", global_scales=torch.ones(4)), r"down.global_scales"),
    "bias": (lambda m: weights(m, "down", bias=torch.ones(4, 255)), r"down.bias is .*\[4, 255\]"),
    "ids' dtype": (lambda m: replace(m, topk_ids=m.topk_ids.short()), r"topk_ids is torch.int16"),
    "ids' tokens": (lambda m: replace(m, topk_ids=m.topk_ids[:1]), r"topk_ids .*\[2, top_k\]"),
    "weights' dtype": (lambda m: replace(m, topk_weights=m.topk_weights.half()), r"topk_weights is torch.float16"),
    "weights' shape": (lambda m: replace(m, topk_weights=m.topk_weights[:, :1]), r"topk_weights .*float32 \[2, 2\]"),
    "devices": (lambda m: replace(m, x=m.x.to("meta")), r"cpu, meta"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_operands_raise_with_their_values(what: str) -> None:
    change, message = WRONG[what]
    made = change(layer(FORMATS["fp8-64"], tokens=2))
    with pytest.raises(OperandError, match=message):
        check_operands(*made.operands, None)


def test_wrong_out_raises() -> None:
    made = layer(FORMATS["fp8-64"], tokens=2)
    with pytest.raises(OperandError, match=r"out is torch.float32"):
        check_operands(*made.operands, torch.empty(2, 256))


@pytest.mark.parametrize("stored", FORMATS)
def test_right_operands_pass(stored: str) -> None:
    check_operands(*layer(FORMATS[stored], tokens=2, bias=True).operands, None)


def test_columns_count_values_of_packed_words() -> None:
    int4 = WeightFormat("int4", (1, 32))
    assert ExpertWeights(torch.zeros(1, 2, 8, dtype=torch.int32), None, int4).columns == 64
    assert ExpertWeights(torch.zeros(1, 2, 8, dtype=torch.uint8), None, int4).columns == 16
