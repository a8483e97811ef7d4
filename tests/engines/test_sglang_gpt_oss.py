"""gpt-oss in SGLang after loading, bit for bit: experts fused and interleaved, in MXFP4, with biases.

SGLang's own loader of these tensors runs on SGLang's own MoE block, with the room that each of its kernels asks for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.layers.moe.fused_moe_triton import layer as moe_layer
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import get_quantization_config, mxfp4
from sglang.srt.models.gpt_oss import GptOssForCausalLM, GptOssSparseMoeBlock

from ep2tp.engines.sglang.experts import left_to_engine, multiples
from ep2tp.engines.weights import padded_weights
from ep2tp.model.facts import ModelFacts, read_facts
from ep2tp.model.families import find_family, load_families
from ep2tp.model.sharding import plan_shards
from tests import quantised
from tests.engines.test_sglang_loaded_parameters import EXPERTS, HIDDEN, Weights, as_rank, assert_reassembled, make_mlp
from tests.quantised import Tensors

MODULE = "model.layers.0.mlp.experts"
CONFIG = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 48,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "vocab_size": 1024,
    "quantization_config": {"quant_method": "mxfp4"},
}
STORED = quantised.COMPRESSED_MXFP4  # the same values, in one tensor for each matrix
KERNELS = ["flashinfer_cutlass", "triton_kernels", "marlin"]
SHAPES = [(2880, 4), (2880, 8), (2880, 16), (1440, 2), (2304, 16)]


def choose(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a kernel's path as on a GPU; the room for a slice is not rounded, rounded to 64, or to 128 values."""
    monkeypatch.setattr(moe_layer, "_is_cpu", False)
    if kernel == "flashinfer_cutlass":  # SGLang's choice for gpt-oss on RTX PRO 6000 (SM120)
        monkeypatch.setattr(mxfp4, "get_moe_runner_backend", lambda: MoeRunnerBackend.FLASHINFER_MXFP4)
        monkeypatch.setattr(
            mxfp4, "get_platform", lambda: SimpleNamespace(is_sm90=False, is_sm100=False, is_sm120=True)
        )
    elif kernel == "triton_kernels":
        monkeypatch.setattr(mxfp4, "has_triton_kernels", True)
    else:
        monkeypatch.setattr(mxfp4, "get_moe_runner_backend", lambda: MoeRunnerBackend.MARLIN)


def facts_of(size: int) -> ModelFacts:
    config = {**CONFIG, "intermediate_size": size}
    found = find_family(config, load_families())
    assert found is not None
    return read_facts(config, *found, "test")


def biases(size: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(size)
    rows = {"gate": size, "up": size, "down": HIDDEN}
    return {role: torch.randn(EXPERTS, count, generator=random).bfloat16() for role, count in rows.items()}


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up in turn, [experts, 2 x rows, ...]."""
    return torch.stack([gate, up], 2).flatten(1, 2)


def as_checkpoint(experts: list[dict[str, Tensors]], bias: dict[str, torch.Tensor]) -> Weights:
    def stacked(role: str, suffix: str) -> torch.Tensor:
        return torch.stack([mlp[role][suffix] for mlp in experts])

    found: Weights = []
    for suffix, name in ((".weight_packed", "blocks"), (".weight_scale", "scales")):
        for module, tensor in (
            ("gate_up_proj", interleaved(stacked("gate", suffix), stacked("up", suffix))),
            ("down_proj", stacked("down", suffix)),
        ):
            stored = tensor.unflatten(-1, (-1, 16)) if name == "blocks" else tensor
            found.append((f"{MODULE}.{module}_{name}", stored))
    found.append((f"{MODULE}.gate_up_proj_bias", interleaved(bias["gate"], bias["up"])))
    found.append((f"{MODULE}.down_proj_bias", bias["down"]))
    return found


class Model(torch.nn.Module):
    """One rank's MoE block under the name that SGLang's loader of the experts looks for."""

    load_experts: Any = GptOssForCausalLM._load_mxfp4_experts_weights

    def __init__(self, size: int, rank: int, ranks: int) -> None:
        super().__init__()
        sizes = {"intermediate_size": size, "hidden_act": "silu", "swiglu_limit": 7.0, "rms_norm_eps": 1e-5}
        self.config = SimpleNamespace(**{**CONFIG, **sizes, "dtype": torch.bfloat16})
        quantisation = get_quantization_config("mxfp4").from_config({"quant_method": "mxfp4"})
        with as_rank(rank, ranks):
            block = GptOssSparseMoeBlock(0, self.config, quantisation, MODULE.removesuffix(".experts"))
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": block})])})

    @property
    def experts(self) -> Any:
        return self.get_submodule(MODULE)

    def values(self, expert: int, role: str) -> torch.Tensor:
        matrix = "w2" if role == "down" else "w13"
        names = {".weight_packed": f"{matrix}_weight", ".weight_scale": f"{matrix}_weight_scale"}
        found = {suffix: getattr(self.experts, name).data[expert] for suffix, name in names.items()}
        return STORED.read({suffix: data[rows_of(role)] for suffix, data in found.items()})


def rows_of(role: str) -> slice:
    return slice({"gate": 0, "up": 1, "down": None}[role], None, None if role == "down" else 2)


@pytest.mark.parametrize(("size", "ranks"), SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gpt_oss_holds_the_original(kernel: str, size: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(kernel, monkeypatch)
    facts = facts_of(size)
    plan = plan_shards(facts, ranks, left_to_engine(facts, ranks, "cuda"), multiples=multiples(facts))
    split = plan.splits["routed"]
    experts, bias = [make_mlp(STORED, size, expert) for expert in range(EXPERTS)], biases(size)
    weights = list(padded_weights(as_checkpoint(experts, bias), plan))
    models = [Model(split.padded, rank, ranks) for rank in range(ranks)]
    for model in models:
        model.load_experts(weights)
    for expert, mlp in enumerate(experts):
        for role, tensors in mlp.items():
            slices = [model.values(expert, role) for model in models]
            assert_reassembled(slices, STORED.read(tensors), 1 if role == "down" else 0, split.per_rank)
        for role in ("gate", "up"):
            slices = [m.experts.w13_weight_bias.data[expert][rows_of(role)].float() for m in models]
            assert_reassembled(slices, bias[role][expert].float(), 0, split.per_rank)
    held = [model.experts.w2_weight_bias.data for model in models]
    assert torch.equal(held[0], bias["down"])  # added once
    assert not any(data.any() for data in held[1:])


@pytest.mark.parametrize("ranks", [4, 8])
def test_sglang_alone_has_no_room_for_whole_blocks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It slices in whole blocks of 32, 736 or 384 values to a rank, and makes room for 720 or 360."""
    choose("flashinfer_cutlass", monkeypatch)
    experts = [make_mlp(STORED, 2880, expert) for expert in range(EXPERTS)]
    with pytest.raises(RuntimeError, match=r"must match the size"):
        Model(2880, 0, ranks).load_experts(as_checkpoint(experts, biases(2880)))
