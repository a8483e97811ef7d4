"""The kernel in Triton's interpreter against float64.

Tensor-core tiles are given FP16: the interpreter of Triton 3.6 to 3.9 multiplies the bits of BF16 in ``tl.dot``. BF16
is checked on a GPU (tests/gpu/test_kernel.py). CUDA-core tiles are given both (the interpreter cuts BF16 off).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep2tp.kernels.configs import KernelConfig, PassConfig, default
from ep2tp.kernels.fused_moe import fused_moe
from ep2tp.kernels.launch import Layer, run_gate_up
from ep2tp.kernels.operands import Activation, ExpertWeights, WeightFormat
from ep2tp.kernels.reference import fused_moe_reference
from tests.kernels.layers import FORMATS, MoeLayer, layer, relative_error

BY_PAIR = KernelConfig(PassConfig(16, 128, 4, 2), PassConfig(32, 256, 4, 1), by_pair=True, by_token=True)
BY_EXPERT = KernelConfig(
    PassConfig(16, 64, 4, 2), PassConfig(32, 128, 4, 2, tiles=3), by_pair=False, by_token=False, pairs=8
)
IN_SLICES = replace(
    BY_EXPERT,
    gate_up=PassConfig(16, 64, 2, 2, slices=2, registers=128),
    down=PassConfig(32, 128, 4, 2, tiles=3, slices=4),
)
ROUNDED = replace(
    BY_EXPERT,
    gate_up=PassConfig(16, 128, 2, 2, input_bits=8),
    down=PassConfig(32, 64, 4, 2, tiles=3, input_bits=8),
)
METHODS = {"by pair": BY_PAIR, "by expert": BY_EXPERT, "by expert, in slices": IN_SLICES}
MIXED = replace(BY_EXPERT, down=BY_PAIR.down, by_token=True)
LIMIT = {torch.float16: 6e-4, torch.bfloat16: 8e-3}
ROUNDED_LIMIT = 0.1  # the interpreter cuts FP8 off; a GPU rounds it
ODD = (80, 96, 144, 160, 176, 192, 288, 320, 352)


def run(
    made: MoeLayer, config: KernelConfig, activation: Activation = Activation.SILU, **options: bool
) -> torch.Tensor:
    """The kernel's result, written over NaN."""
    out = torch.full(made.x.shape, float("nan"), dtype=made.x.dtype)
    result = fused_moe(*made.operands, activation=activation, out=out, config=config, **options)
    assert result is out
    return out


def check(made: MoeLayer, config: KernelConfig, activation: Activation = Activation.SILU, **options: bool) -> None:
    reference = fused_moe_reference(*made.operands, activation, **options)
    assert relative_error(run(made, config, activation, **options), reference) < LIMIT[made.x.dtype]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stored", FORMATS)
def test_every_format(stored: str, method: str) -> None:
    check(layer(FORMATS[stored], tokens=3, hidden=160, inner=96, bias=True, dtype=torch.float16), METHODS[method])


@pytest.mark.parametrize("stored", ["bf16", "fp8-64", "nvfp4"])
def test_first_by_expert_and_then_by_token(stored: str) -> None:
    check(layer(FORMATS[stored], tokens=3, hidden=160, inner=96, bias=True, dtype=torch.float16), MIXED)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inner", ODD)
def test_odd_slices(inner: int, method: str) -> None:
    check(layer(FORMATS["fp8-16"], tokens=2, hidden=176, inner=inner, dtype=torch.float16), METHODS[method])


@pytest.mark.parametrize("stored", [name for name in FORMATS if name.startswith("fp8")])
def test_inputs_in_fp8(stored: str) -> None:
    made = layer(FORMATS[stored], tokens=3, hidden=160, inner=96, bias=True, dtype=torch.float16)
    error = relative_error(run(made, ROUNDED), fused_moe_reference(*made.operands))
    if stored == "fp8-16":  # a tile would have 16 columns
        assert error < LIMIT[torch.float16]
    else:
        assert LIMIT[torch.float16] < error < ROUNDED_LIMIT


@pytest.mark.parametrize("stored", ["bf16", "nvfp4"])
def test_inputs_of_other_formats_are_not_rounded(stored: str) -> None:
    check(layer(FORMATS[stored], tokens=3, hidden=160, inner=96, dtype=torch.float16), ROUNDED)


def test_inputs_are_not_rounded_where_fp8_has_no_instructions() -> None:
    check(layer(FORMATS["fp8-64"], tokens=3, dtype=torch.float16), replace(ROUNDED, fp8_bits=True))


@pytest.mark.parametrize("stored", ["fp8-128", "fp8-32", "fp8-channel", "fp8-tensor"])
def test_inputs_that_fp8_holds_are_exact(stored: str) -> None:
    made = layer(FORMATS[stored], tokens=5, dtype=torch.float16)
    values = torch.randn(made.x.shape).mul(60).clamp(-448, 448)
    values.view(5, -1, 32)[:, :, 5] = 448  # so that each group's scale is a power of two
    made = replace(made, x=values.to(torch.float8_e4m3fn).to(torch.float16) / 64)
    moe = Layer(made.gate_up, made.down, Activation.SILU, False)
    rounded, exact = (run_gate_up(moe, config, made.x, *made.operands[3:]) for config in (ROUNDED, BY_EXPERT))
    assert relative_error(rounded, exact.double()) < LIMIT[torch.float16]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf")])
def test_infinity_stays_where_inputs_are_rounded(bad: float) -> None:
    """NaN is checked on a GPU: the interpreter's FP8 has none."""
    made = layer(FORMATS["fp8-64"], tokens=3, dtype=torch.float16)
    made.x[1, 7] = bad
    found, reference = run(made, ROUNDED), fused_moe_reference(*made.operands)
    assert not found[~reference.isfinite()].isfinite().any()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("stored", ["bf16", "fp8-64"])
def test_bf16_activations(stored: str) -> None:
    check(layer(FORMATS[stored], tokens=2), BY_PAIR)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stored", ["fp8-64", "nvfp4"])
def test_integer_arithmetic_gives_the_same_bits(stored: str, method: str) -> None:
    made = layer(FORMATS[stored], tokens=2, dtype=torch.float16)
    one, other = (run(made, replace(METHODS[method], fp8_bits=bits)) for bits in (False, True))
    assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", list(Activation))
def test_activations(activation: Activation, method: str) -> None:
    made = layer(FORMATS["mxfp4"], tokens=2, bias=True, dtype=torch.float16)
    made = replace(made, x=made.x * 8)  # large enough to be clamped
    check(made, METHODS[method], activation)


@pytest.mark.parametrize("method", METHODS)
def test_router_weight_on_input(method: str) -> None:
    made = layer(FORMATS["fp8-64"], tokens=3, top_k=1, bias=True, dtype=torch.float16)
    made = replace(made, topk_weights=torch.rand_like(made.topk_weights) + 0.5)
    check(made, METHODS[method], apply_router_weight_on_input=True)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(tokens=st.integers(1, 20), top_k=st.integers(1, 16), experts=st.integers(1, 24), seed=st.integers(0, 999))
def test_routing(method: str, tokens: int, top_k: int, experts: int, seed: int) -> None:
    """Any number of tokens, experts and slots; with fewer experts than slots, an expert comes twice in a token."""
    made = layer(
        FORMATS["bf16"],
        tokens=tokens,
        hidden=32,
        inner=16,
        experts=experts,
        top_k=top_k,
        dtype=torch.float16,
        seed=seed,
    )
    check(made, METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_all_tokens_on_one_expert(method: str, ids: torch.dtype) -> None:
    """More pairs of one expert than a tile takes; the other experts are empty."""
    made = layer(FORMATS["fp8-64"], tokens=11, top_k=2, dtype=torch.float16)
    check(replace(made, topk_ids=torch.full_like(made.topk_ids, 2, dtype=ids)), METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_unknown_experts_add_nothing(method: str) -> None:
    made = layer(FORMATS["fp8-64"], tokens=4, bias=True, dtype=torch.float16)
    made.topk_ids[0] = torch.tensor([-1, 1])
    made.topk_ids[1] = torch.tensor([0, 4])
    made.topk_ids[2] = torch.tensor([2**31 - 1, -(2**31)])
    check(made, METHODS[method])
    assert not run(made, METHODS[method])[2].any()


@pytest.mark.parametrize("method", METHODS)
def test_strided_inputs(method: str) -> None:
    made = layer(FORMATS["fp8-64"], tokens=3, dtype=torch.float16)
    wide = torch.full((3, 300), float("nan"), dtype=torch.float16)
    wide[:, 20:276] = made.x
    check(replace(made, x=wide[:, 20:276]), METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.SWIGLU_OAI])
def test_nan_and_infinity_stay(bad: float, method: str, activation: Activation) -> None:
    """In the token that has it, wherever the reference has no finite value, and in no other."""
    made = layer(FORMATS["bf16"], tokens=3, dtype=torch.float16)
    made.x[1, 7] = bad
    found = run(made, METHODS[method], activation)
    reference = fused_moe_reference(*made.operands, activation)
    assert torch.equal(found.isnan(), reference.isnan())
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_nan_weights_stay(method: str) -> None:
    """By integer arithmetic; the GPU's own conversion is checked on a GPU, as the interpreter's reads NaN as 480."""
    made = layer(FORMATS["fp8-64"], tokens=2, dtype=torch.float16)
    made.gate_up.values.view(torch.uint8)[int(made.topk_ids[0, 0]), 3, 5] = 0x7F
    assert run(made, replace(METHODS[method], fp8_bits=True))[0].isnan().all()


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_than_one_launch_takes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ep2tp.kernels.fused_moe.MAX_PAIRS", 8)
    check(layer(FORMATS["bf16"], tokens=10, hidden=32, inner=16, dtype=torch.float16), METHODS[method])


def test_no_tokens_and_no_slots() -> None:
    made = layer(FORMATS["bf16"], tokens=3, dtype=torch.float16)
    nobody = fused_moe(made.x[:0], made.gate_up, made.down, made.topk_weights[:0], made.topk_ids[:0])
    assert nobody.shape == (0, 256)
    nothing = fused_moe(made.x, made.gate_up, made.down, made.topk_weights[:, :0], made.topk_ids[:, :0])
    assert torch.equal(nothing, torch.zeros_like(made.x))


@pytest.mark.parametrize("tokens", [1, 5])
def test_default_config(tokens: int) -> None:
    made = layer(FORMATS["fp8-64"], tokens=tokens, dtype=torch.float16)
    check(made, default(tokens, (8, 0)))


def test_refined_scales_give_the_same_bits() -> None:
    """Scales repeated on a finer grid: the same weights, so the same sums, in the same order."""
    made = layer(FORMATS["fp8-128"], tokens=1, hidden=256, inner=128, dtype=torch.float16)

    def refine(weights: ExpertWeights) -> ExpertWeights:
        assert weights.scales is not None
        finer = weights.scales.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return replace(weights, scales=finer, format=WeightFormat("fp8", (32, 32)))

    refined = replace(made, gate_up=refine(made.gate_up), down=refine(made.down))
    assert torch.equal(run(made, BY_PAIR), run(refined, BY_PAIR))


@pytest.mark.parametrize("config", [None, BY_EXPERT, IN_SLICES])
def test_torch_compile_sees_one_operator(config: KernelConfig | None) -> None:
    made = layer(FORMATS["nvfp4"], tokens=2, bias=True, dtype=torch.float16)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        # What differs in a second config of a process is a symbolic number, which Python's operators read.
        seen.extend(str(call) for call in calls if getattr(call, "__module__", "") != "_operator")
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def model(x: torch.Tensor) -> torch.Tensor:
        return fused_moe(x, made.gate_up, made.down, made.topk_weights, made.topk_ids, config=config)

    assert torch.equal(model(made.x), fused_moe(*made.operands, config=config))
    assert seen == ["ep2tp.fused_moe.default"]


def test_operator_is_registered_as_torch_asks() -> None:
    made = layer(FORMATS["mxfp4"], tokens=2, dtype=torch.float16)
    gate_up, down = ([each.values, each.scales, None, None] for each in (made.gate_up, made.down))
    formats = ("mxfp4 mxfp4", [1, 32, 1, 32])
    arguments = (made.x, gate_up, down, made.topk_weights, made.topk_ids, *formats, "silu", False, [])
    torch.library.opcheck(torch.ops.ep2tp.fused_moe.default, arguments)
