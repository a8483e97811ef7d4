"""The fused-MoE kernel on a GPU: exactness, every byte written, CUDA graphs, torch.compile.

``compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_kernel.py -k "not large"`` runs it under a checker.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from ep2tp.kernels.configs import KernelConfig, PassConfig, default
from ep2tp.kernels.fused_moe import fused_moe
from ep2tp.kernels.launch import Layer, run_gate_up
from ep2tp.kernels.operands import Activation
from ep2tp.kernels.reference import fused_moe_reference
from tests.kernels.layers import FORMATS, MoeLayer, layer, relative_error

pytestmark = pytest.mark.gpu

CAPABILITY = torch.cuda.get_device_capability()
BITS = CAPABILITY < (8, 9)
OVERLAPS = [False, True] if CAPABILITY >= (9, 0) else [False]
BY_PAIR = KernelConfig(PassConfig(16, 256, 4, 3), PassConfig(16, 512, 4, 1), by_pair=True, by_token=True, fp8_bits=BITS)
BY_EXPERT = KernelConfig(
    PassConfig(32, 64, 2, 3), PassConfig(64, 64, 4, 3, tiles=3), by_pair=False, by_token=False, pairs=8, fp8_bits=BITS
)
METHODS = {
    "by pair": BY_PAIR,
    "by expert": BY_EXPERT,
    "by expert, in slices": replace(
        BY_EXPERT,
        gate_up=PassConfig(16, 256, 4, 3, slices=4, registers=128),
        down=PassConfig(32, 128, 4, 2, tiles=3, slices=2),
    ),
    "by expert, inputs in FP8": replace(
        BY_EXPERT,
        gate_up=PassConfig(64, 128, 4, 3, input_bits=8),
        down=PassConfig(32, 128, 2, 3, tiles=3, input_bits=8),
        pairs=16,
    ),
    "by expert, then by token": replace(BY_EXPERT, down=BY_PAIR.down, by_token=True),
}
LIMIT = {torch.bfloat16: 5e-3, torch.float16: 7e-4}
FP8_LIMIT = 5e-2


def fresh() -> int:
    """A seed that no earlier run had."""
    return time.time_ns() % 2**31


def run(made: MoeLayer, config: KernelConfig, activation: Activation = Activation.SILU) -> torch.Tensor:
    """The result, written over NaN."""
    out = torch.full_like(made.x, float("nan"))
    return fused_moe(*made.operands, activation=activation, out=out, config=config)


def check(made: MoeLayer, config: KernelConfig, activation: Activation = Activation.SILU) -> None:
    error = relative_error(run(made, config, activation), fused_moe_reference(*made.operands, activation))
    is_rounded = min(config.gate_up.input_bits, config.down.input_bits) == 8 and made.gate_up.format.kind == "fp8"
    assert error < (FP8_LIMIT if is_rounded else LIMIT[made.x.dtype])


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stored", FORMATS)
def test_every_format(stored: str, method: str, dtype: torch.dtype, overlap: bool) -> None:
    made = layer(
        FORMATS[stored],
        tokens=5,
        hidden=512,
        inner=160,
        experts=8,
        top_k=3,
        dtype=dtype,
        bias=True,
        seed=fresh(),
        device="cuda",
    )
    check(made, replace(METHODS[method], overlap=overlap))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inner", [80, 96, 144, 160, 176, 192, 288, 320, 352])
def test_odd_slices(inner: int, method: str) -> None:
    made = layer(
        FORMATS["fp8-16"], tokens=9, hidden=1040, inner=inner, experts=16, top_k=8, seed=fresh(), device="cuda"
    )
    check(made, METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", list(Activation))
def test_activations(activation: Activation, method: str) -> None:
    made = layer(FORMATS["mxfp4"], tokens=4, bias=True, seed=fresh(), device="cuda")
    check(replace(made, x=made.x * 8), METHODS[method], activation)


@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 128, 300])
def test_large_layer_with_defaults(tokens: int) -> None:
    made = layer(
        FORMATS["fp8-128"], tokens=tokens, hidden=7168, inner=256, experts=64, top_k=8, seed=fresh(), device="cuda"
    )
    check(made, default(tokens, CAPABILITY))


@pytest.mark.parametrize("method", METHODS)
def test_unknown_and_repeated_experts(method: str) -> None:
    made = layer(FORMATS["fp8-64"], tokens=12, experts=4, top_k=2, bias=True, seed=fresh(), device="cuda")
    made.topk_ids[0] = torch.tensor([-1, 9])
    made.topk_ids[1:] = 2
    check(made, METHODS[method])
    assert not run(made, METHODS[method])[0].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay(bad: float, method: str) -> None:
    made = layer(FORMATS["fp8-64"], tokens=3, seed=fresh(), device="cuda")
    made.x[1, 7] = bad
    found = run(made, METHODS[method])
    reference = fused_moe_reference(*made.operands)
    if METHODS[method].gate_up.input_bits == 8:  # a group's scale is infinite, too
        assert not found[~reference.isfinite()].isfinite().any()
    else:
        assert torch.equal(found.isnan(), reference.isnan())
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("stored", ["fp8-128", "fp8-64", "fp8-32", "fp8-channel", "fp8-tensor"])
def test_inputs_that_fp8_holds_are_exact(stored: str) -> None:
    made = layer(FORMATS[stored], tokens=9, hidden=512, seed=fresh(), device="cuda")
    values = torch.randn_like(made.x, dtype=torch.float32).mul(60).clamp(-448, 448)
    values.view(9, -1, 32)[:, :, 5] = 448  # so that each group's scale is a power of two
    made = replace(made, x=values.to(torch.float8_e4m3fn).to(made.x.dtype) / 64)
    moe = Layer(made.gate_up, made.down, Activation.SILU, False)
    config = METHODS["by expert, inputs in FP8"]
    found, right = (
        run_gate_up(moe, replace(config, gate_up=replace(config.gate_up, input_bits=bits)), made.x, *made.operands[3:])
        for bits in (8, 16)
    )
    assert relative_error(found, right.double()) < 3e-3


@pytest.mark.parametrize("method", METHODS)
def test_nan_weights_stay(method: str) -> None:
    made = layer(FORMATS["fp8-64"], tokens=2, seed=fresh(), device="cuda")
    made.gate_up.values.view(torch.uint8)[int(made.topk_ids[0, 0]), 3, 5] = 0x7F
    assert run(made, METHODS[method])[0].isnan().all()


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_each_time_and_in_cuda_graphs(method: str, overlap: bool) -> None:
    """Replays read the inputs of the moment. Many layers in a row, whose buffers are reused: what races would show."""
    made = layer(FORMATS["fp8-128"], tokens=6, hidden=2048, inner=256, experts=32, top_k=8, seed=fresh(), device="cuda")
    config = replace(METHODS[method], overlap=overlap)
    x, outs = made.x.clone(), [torch.empty_like(made.x) for _ in range(20)]
    static = replace(made, x=x)
    fused_moe(*static.operands, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            fused_moe(*static.operands, out=out, config=config)
    for _ in range(50):
        x.copy_(torch.randn_like(x))
        made.topk_ids.copy_(torch.rand(6, 32, device="cuda").topk(8).indices)
        expected = fused_moe(*static.operands, config=replace(config, overlap=False))
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)
    del graph
    gc.collect()


def test_torch_compile_sees_one_operator() -> None:
    made = layer(FORMATS["fp8-64"], tokens=3, seed=fresh(), device="cuda")

    def model(x: torch.Tensor) -> torch.Tensor:
        return fused_moe(x * 1.0, made.gate_up, made.down, made.topk_weights, made.topk_ids) + 1

    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(made.x), model(made.x), atol=1e-2)
