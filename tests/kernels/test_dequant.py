"""All codes of each format, against torch's own conversion or the format's table."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ep2tp.kernels.device.dequant import fp4_value, fp8_value, scale_value


@triton.jit
def decode(codes, values, KIND: tl.constexpr, BITS: tl.constexpr):
    index = tl.arange(0, 256)
    code = tl.load(codes + index)
    if KIND == "fp8":
        value = fp8_value(code, BITS)
    elif KIND == "fp4":
        value = fp4_value(code.to(tl.int32) & 15)
    else:
        value = scale_value(code, KIND, BITS)
    tl.store(values + index, value)


def decoded(kind: str, bits: bool = False) -> torch.Tensor:
    values = torch.full((256,), -1.0)
    decode[(1,)](torch.arange(256).to(torch.uint8), values, KIND=kind, BITS=bits)
    return values


CODES = torch.arange(256).to(torch.uint8)


@pytest.mark.parametrize("bits", [False, True])
def test_e4m3(bits: bool) -> None:
    expected = CODES.view(torch.float8_e4m3fn).float()
    found = decoded("fp8", bits)
    finite = expected.isfinite()
    assert torch.equal(found[finite], expected[finite])
    assert not bits or found[~finite].isnan().all()  # the interpreter's own conversion reads NaN as 480


def test_e8m0() -> None:
    expected = CODES.view(torch.float8_e8m0fnu).float()
    assert torch.equal(decoded("mxfp4").nan_to_num(-1), expected.nan_to_num(-1))


def test_e2m1() -> None:
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(decoded("fp4")[:16], torch.cat((positive, -positive)))
