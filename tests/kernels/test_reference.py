"""The reference against arithmetic written out by hand."""

from __future__ import annotations

import torch

from ep2tp.kernels.operands import Activation, ExpertWeights, WeightFormat
from ep2tp.kernels.reference import activate, dequantise, fused_moe_reference
from tests.kernels.layers import FORMATS, layer


def test_packed_values_are_little_endian_nibbles() -> None:
    word = torch.tensor([[[0x76543210]]], dtype=torch.int32)
    scales = torch.full((1, 1, 1), 2.0)
    found = dequantise(ExpertWeights(word, scales, WeightFormat("int4", (1, 32))))
    assert found.flatten().tolist() == [2.0 * (nibble - 8) for nibble in range(8)]


def test_nvfp4_scales_are_products() -> None:
    packed = torch.tensor([[[0x97] * 8 + [0x20] * 8]], dtype=torch.uint8)
    scales = torch.tensor([[[1.5, 4.0]]]).to(torch.float8_e4m3fn)
    stored = ExpertWeights(packed, scales, WeightFormat("nvfp4", (1, 16)), global_scales=torch.tensor([0.25]))
    assert dequantise(stored).flatten().tolist() == [2.25, -0.1875] * 8 + [0.0, 1.0] * 8


def test_block_scales_cover_partly_filled_blocks() -> None:
    values = torch.ones(1, 48, 80).to(torch.float8_e4m3fn)
    scales = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    found = dequantise(ExpertWeights(values, scales, WeightFormat("fp8", (32, 32))))
    assert found[0, 31, 79] == 3 and found[0, 32, 31] == 4 and found[0, 47, 64] == 6


def test_gpt_oss_activation_is_clamped() -> None:
    found = activate(torch.tensor([9.0, 9.0, -9.0, -9.0]), Activation.SWIGLU_OAI)
    gate = torch.tensor([7.0, -9.0])
    assert torch.allclose(found, gate * torch.sigmoid(1.702 * gate) * torch.tensor([8.0, -6.0]))
    assert torch.equal(found, activate(torch.tensor([9.0, -9.0, 9.0, -9.0]), Activation.SWIGLU_OAI_SPLIT))


def test_one_token_by_hand() -> None:
    made = layer(FORMATS["fp8-64"], tokens=1, bias=True)
    x = made.x[0].double()
    expected = torch.zeros(256, dtype=torch.float64)
    assert made.gate_up.bias is not None and made.down.bias is not None
    for weight, expert in zip(made.topk_weights[0].double(), made.topk_ids[0].tolist(), strict=True):
        both = dequantise(made.gate_up)[expert] @ x + made.gate_up.bias[expert]
        inner = torch.nn.functional.silu(both[:128]) * both[128:]
        expected += weight * (dequantise(made.down)[expert] @ inner + made.down.bias[expert])
    assert torch.allclose(fused_moe_reference(*made.operands)[0], expected)
