"""vLLM's parameters after loading, bit for bit.

For each format and shape: random checkpoint tensors go through ``padded_weights`` and then, for each rank, through the
weight loaders of the real layers (``RoutedExperts``, ``MergedColumnParallelLinear``, ``RowParallelLinear``) with the
parameters that the real quantisation methods create. Dequantised, put together and cut to the unpadded size, the ranks'
parameters are the dequantised original, and the padding is zero. Nothing runs after the loaders, which is where kernels
would repack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config

from ep2tp.engines.padding import note_of
from ep2tp.engines.vllm import plugin
from ep2tp.engines.vllm.experts import left_to_engine
from ep2tp.engines.weights import pad, padded_weights, safetensors_dtype
from ep2tp.errors import CheckpointError, LaunchError
from ep2tp.model.facts import ModelFacts, read_facts
from ep2tp.model.families import find_family, load_families
from ep2tp.model.sharding import ShardPlan, plan_shards
from tests import quantised
from tests.quantised import Stored, Tensors

HIDDEN, EXPERTS = 256, 2
Weights = list[tuple[str, torch.Tensor]]

LINEAR_FORMATS = [
    quantised.BF16,
    quantised.FP8_BLOCK,
    quantised.COMPRESSED_FP8_BLOCK,
    quantised.COMPRESSED_FP8_CHANNEL,
    quantised.INT4_GROUP32,
    quantised.INT4_GROUP128,
    quantised.COMPRESSED_NVFP4,
    quantised.MODELOPT_NVFP4,
    quantised.COMPRESSED_MXFP4,
]
ROUTED_FORMATS = [*LINEAR_FORMATS, quantised.DEEPSEEK_V4_MXFP4, quantised.GPTQ, quantised.AWQ]
ROUTED_SHAPES = [
    *((1408, ranks) for ranks in (2, 3, 4, 6, 8)),
    *((1536, ranks) for ranks in (8, 16)),
    *((768, ranks) for ranks in (4, 8)),
    *((2560, ranks) for ranks in (8,)),
    *((1280, ranks) for ranks in (4, 8)),
    *((2304, ranks) for ranks in (8, 16)),
    *((2880, ranks) for ranks in (8,)),
    *((2048, ranks) for ranks in (3, 6)),
]
LINEAR_SHAPES = [(1408, 2), (1408, 8), (1536, 16), (768, 8), (2880, 8), (2048, 3), (1408, 6)]

_QUANTISATION = "vllm.model_executor.layers.quantization."
_COMPRESSED = _QUANTISATION + "compressed_tensors."
_MXFP4_CHOICE = _QUANTISATION + "mxfp4.select_deepseek_v4_mxfp4_moe_backend"


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the choice of a kernel where this CPU has none.

    A kernel is chosen in the constructors of the quantisation methods or at the end of create_weights, and is used from
    process_weights_after_loading on, which no test here calls. The parameters and their loaders are created by vLLM's
    own create_weights. The backends named here add no padding of their own; tests of those that do name them.
    """
    kernel = SimpleNamespace(input_quant_key=lambda: None)
    experts = {
        _COMPRESSED + "compressed_tensors_moe.compressed_tensors_moe_wna16.select_wna16_moe_backend": WNA16MoEBackend,
        _QUANTISATION + "auto_gptq.select_wna16_moe_backend": WNA16MoEBackend,
        _QUANTISATION + "auto_awq.select_wna16_moe_backend": WNA16MoEBackend,
        _COMPRESSED
        + "compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4.select_nvfp4_moe_backend": NvFp4MoeBackend,
        _QUANTISATION + "modelopt.select_nvfp4_moe_backend": NvFp4MoeBackend,
        _MXFP4_CHOICE: Mxfp4MoeBackend,
    }
    for name, backends in experts.items():
        backend = backends.TRITON if backends is WNA16MoEBackend else backends.EMULATION
        monkeypatch.setattr(name, lambda *args, chosen=backend, **kwargs: (chosen, None))
    for name in (
        _QUANTISATION + "fp8.init_fp8_linear_kernel",
        _QUANTISATION + "modelopt.init_nvfp4_linear_kernel",
        _COMPRESSED + "schemes.compressed_tensors_w8a8_fp8.init_fp8_linear_kernel",
        _COMPRESSED + "schemes.compressed_tensors_w4a4_nvfp4.init_nvfp4_linear_kernel",
        _COMPRESSED + "schemes.compressed_tensors_w4a4_mxfp4.init_mxfp4_linear_kernel",
    ):
        monkeypatch.setattr(name, lambda *args, **kwargs: kernel)


@dataclass(frozen=True)
class Naming:
    """Where a family keeps its MLPs, and how it calls (gate, down, up)."""

    config: Mapping[str, Any]
    experts: str
    shared: str
    dense: str
    names: tuple[str, str, str]

    def module(self, class_name: str, role: str) -> str:
        """Full name of a projection of the shared experts or of a dense MLP."""
        return f"{getattr(self, class_name)}.{self.name(role)}"

    def name(self, role: str) -> str:
        return self.names[("gate", "down", "up").index(role)]


DEEPSEEK_V3 = Naming(
    {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 48,
        "kv_lora_rank": 512,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "vocab_size": 1024,
    },
    "model.layers.1.mlp.experts",
    "model.layers.1.mlp.shared_experts",
    "model.layers.0.mlp",
    ("gate_proj", "down_proj", "up_proj"),
)
DEEPSEEK_V4 = Naming(
    {**DEEPSEEK_V3.config, "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"]},
    "layers.1.ffn.experts",
    "layers.1.ffn.shared_experts",
    "",
    ("w1", "w2", "w3"),
)
QWEN3_MOE = Naming(
    {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 48,
        "num_key_value_heads": 48,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "vocab_size": 1024,
    },
    "model.layers.0.mlp.experts",
    "",
    "",
    ("gate_proj", "down_proj", "up_proj"),
)


def naming_of(stored: Stored) -> Naming:
    return DEEPSEEK_V4 if stored is quantised.DEEPSEEK_V4_MXFP4 else QWEN3_MOE


def facts_of(stored: Stored, naming: Naming, **sizes: int) -> ModelFacts:
    config = {**naming.config, **sizes}
    if stored.quantization is not None:
        config["quantization_config"] = stored.quantization
    found = find_family(config, load_families())
    assert found is not None
    return read_facts(config, *found, "test")


def plan_routed(stored: Stored, size: int, ranks: int) -> ShardPlan:
    return plan_shards(facts_of(stored, naming_of(stored), moe_intermediate_size=size), ranks)


def make_experts(stored: Stored, naming: Naming, size: int) -> dict[tuple[int, str], Tensors]:
    """Checkpoint tensors of each (expert, role)."""
    random = torch.Generator().manual_seed(size)
    return {
        (expert, role): stored.make(random, *((HIDDEN, size) if role == "down" else (size, HIDDEN)))
        for expert in range(EXPERTS)
        for role in ("gate", "up", "down")
    }


def as_checkpoint(experts: Mapping[tuple[int, str], Tensors], naming: Naming) -> Weights:
    return [
        (f"{naming.experts}.{expert}.{naming.name(role)}{suffix}", tensor)
        for (expert, role), tensors in experts.items()
        for suffix, tensor in tensors.items()
    ]


@cache
def vllm_config() -> VllmConfig:
    config = VllmConfig()
    hf_config = SimpleNamespace(model_type="deepseek_v4", expert_dtype="fp4")
    config.model_config = SimpleNamespace(dtype=torch.bfloat16, hf_config=hf_config)
    return config


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Make vLLM believe that this process is one of a tensor-parallel group. Nothing communicates."""
    group = SimpleNamespace(world_size=ranks, rank_in_group=rank)
    with patch.object(parallel_state, "_TP", group), set_current_vllm_config(vllm_config()):
        yield


def vllm_quantisation(stored: Stored) -> Any:
    if stored.quantization is None:
        return None
    method = stored.quantization["quant_method"]
    names = {"modelopt": "modelopt_fp4", "gptq": "auto_gptq", "awq": "auto_awq"}
    if stored.name.startswith("deepseek_v4"):
        names["fp8"] = "deepseek_v4_fp8"
    return get_quantization_config(names.get(method, method)).from_config(dict(stored.quantization))


def routed_experts(stored: Stored, size: int, ranks: int, rank: int, *, transposed: bool = False) -> RoutedExperts:
    """vLLM's layer for one rank of a model whose config says ``size``.

    ``transposed`` is for checkpoints whose fused experts are stored [expert, input, output].
    """
    naming = naming_of(stored)
    parallel = FusedMoEParallelConfig(
        **{"tp_size": ranks, "tp_rank": rank, "dp_size": 1, "dp_rank": 0, "pcp_size": 1, "pcp_rank": 0},
        **{"ep_size": 1, "ep_rank": 0, "sp_size": 1, "use_ep": False, "enable_eplb": False},
        all2all_backend="allgather_reducescatter",
    )
    config = FusedMoEConfig(
        **{"num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_logical_experts": EXPERTS},
        experts_per_token=1,
        hidden_dim=HIDDEN,
        intermediate_size=size,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )
    placement = ExpertMapManager(
        **{"max_num_batched_tokens": 8, "top_k": 1, "global_num_experts": EXPERTS, "num_redundant_experts": 0},
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    gate, down, up = naming.names
    with as_rank(rank, ranks):
        layer = RoutedExperts(
            naming.experts,
            torch.bfloat16,
            config,
            vllm_quantisation(stored),
            placement,
            ckpt_gate_proj_name=gate,
            ckpt_down_proj_name=down,
            ckpt_up_proj_name=up,
            is_fused_checkpoint_transposed=transposed,
        )
    if layer.intermediate_size_per_partition == size // ranks:
        poison(layer)
    return layer


def poison(layer: torch.nn.Module) -> None:
    """Fill every parameter with bytes that dequantise to wrong values, so that what is not loaded is noticed."""
    for parameter in layer.parameters():
        parameter.data.view(torch.uint8).fill_(0xFF)


def load_experts(layer: RoutedExperts, weights: Weights) -> None:
    """Load as vLLM's models do, by the layer's own mapping of names, and check that every parameter was loaded."""
    prefix = layer.layer_name + "."
    loaded = set(layer.load_weights((name.removeprefix(prefix), tensor) for name, tensor in in_vllm_names(weights)))
    optional = {name for name, _ in layer.named_parameters() if name.endswith("_bias")}
    assert loaded >= {name for name, _ in layer.named_parameters()} - optional


def in_vllm_names(weights: Weights) -> Iterable[tuple[str, torch.Tensor]]:
    if not weights[0][0].startswith("layers."):
        return weights
    from vllm.models.deepseek_v4.cpu.model import _make_deepseek_v4_weights_mapper

    mapped = _make_deepseek_v4_weights_mapper("fp4").apply(weights)
    return [(name.removeprefix("model."), tensor) for name, tensor in mapped]


def expert_tensors(layer: RoutedExperts, expert: int, role: str, suffixes: Iterable[str]) -> Tensors:
    """One expert's matrix as a rank holds it, under the checkpoint's suffixes."""
    found = {}
    for suffix in suffixes:
        name = ".weight_scale" if suffix == ".scale" else suffix
        parameter = getattr(layer, f"{'w2' if role == 'down' else 'w13'}_{name[1:]}")
        data = parameter.data[expert]
        if role != "down" and suffix != ".weight_shape":
            dim = data.ndim - 1 if getattr(parameter, "is_transposed", False) else 0
            data = data.chunk(2, dim)[0 if role == "gate" else 1]
        found[suffix] = data
    return found


def assert_reassembled(slices: Sequence[torch.Tensor], original: torch.Tensor, axis: int, per_rank: int) -> None:
    """Check the slices of all ranks against the values that they are to hold.

    Args:
        slices: dequantised slices in order of rank; what an engine appends to a slice is zero.
        original: the dequantised checkpoint tensor.
        axis: the sliced axis.
        per_rank: values of the axis that the plan gives each rank.
    """
    whole = torch.cat([part.narrow(axis, 0, per_rank) for part in slices], axis)
    size = original.shape[axis]
    assert torch.equal(
        whole.narrow(axis, 0, size).contiguous().view(torch.int32), original.contiguous().view(torch.int32)
    )
    assert not whole.narrow(axis, size, whole.shape[axis] - size).any()
    for part in slices:
        assert not part.narrow(axis, per_rank, part.shape[axis] - per_rank).any()


def check_routed(stored: Stored, size: int, ranks: int, plan: ShardPlan) -> None:
    naming = naming_of(stored)
    experts = make_experts(stored, naming, size)
    assert_experts_hold(stored, experts, list(padded_weights(as_checkpoint(experts, naming), plan)), plan)


def assert_experts_hold(
    stored: Stored, experts: Mapping[tuple[int, str], Tensors], weights: Weights, plan: ShardPlan
) -> None:
    """Load padded weights on every rank, and compare what the ranks hold with the checkpoint."""
    ranks, split = plan.ranks, plan.splits["routed"]
    layers = [routed_experts(stored, split.padded, ranks, rank) for rank in range(ranks)]
    for layer in layers:
        load_experts(layer, weights)
    for (expert, role), tensors in experts.items():
        slices = [stored.read(expert_tensors(layer, expert, role, tensors)) for layer in layers]
        assert_reassembled(slices, stored.read(tensors), 1 if role == "down" else 0, split.per_rank)


@pytest.mark.parametrize(("size", "ranks"), ROUTED_SHAPES)
@pytest.mark.parametrize("stored", ROUTED_FORMATS, ids=lambda stored: stored.name)
def test_routed_experts_hold_the_original(stored: Stored, size: int, ranks: int) -> None:
    if stored is quantised.AWQ and size % 128:
        pytest.skip("AWQ makes no such checkpoint: it needs whole groups")
    check_routed(stored, size, ranks, plan_routed(stored, size, ranks))


@pytest.mark.parametrize(("size", "ranks"), [(1408, 8), (2304, 16), (2880, 8), (2048, 3)])
@pytest.mark.parametrize("backend", ["MARLIN", "FLASHINFER_TRTLLM_MXFP4_MXFP8", "DEEPGEMM_MXFP4"])
def test_backends_that_widen_the_slices_hold_the_original(
    backend: str, size: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These round the slices up to 128 values, and fill only the part that the checkpoint has."""
    monkeypatch.setattr(_MXFP4_CHOICE, lambda *args, **kwargs: (Mxfp4MoeBackend[backend], None))
    stored = quantised.DEEPSEEK_V4_MXFP4
    plan = plan_routed(stored, size, ranks)
    assert routed_experts(stored, plan.splits["routed"].padded, ranks, 0).intermediate_size_per_partition % 128 == 0
    check_routed(stored, size, ranks, plan)


@pytest.mark.parametrize(
    ("size", "ranks"), [(1408, 2), (1408, 4), (1536, 8), (1536, 16), (768, 4), (768, 8), (2560, 8)]
)
def test_what_is_left_to_vllm_holds_the_original(size: int, ranks: int) -> None:
    """Where ep2tp says that vLLM refines FP8 block scales exactly, it does."""
    stored = quantised.FP8_BLOCK
    facts = facts_of(stored, QWEN3_MOE, moe_intermediate_size=size)
    handled = left_to_engine(facts, ranks, "auto")
    block = int(re.search(r"(\d+)x\1 grid", handled["routed"]).group(1))  # type: ignore[union-attr]
    plan = plan_shards(facts, ranks, handled)
    assert not plan.is_padded
    experts = make_experts(stored, QWEN3_MOE, size)
    weights = list(padded_weights(as_checkpoint(experts, QWEN3_MOE), plan))
    layers = [routed_experts(stored, size, ranks, rank) for rank in range(ranks)]
    for layer in layers:
        load_experts(layer, weights)
    finer = quantised.fp8_block(size=block)
    for (expert, role), tensors in experts.items():
        slices = [finer.read(expert_tensors(layer, expert, role, tensors)) for layer in layers]
        assert_reassembled(slices, stored.read(tensors), 1 if role == "down" else 0, size // ranks)


@pytest.mark.parametrize("stored", [quantised.INT4_GROUP32, quantised.INT4_GROUP128], ids=lambda stored: stored.name)
def test_packed_integers_state_their_padded_shape(stored: Stored) -> None:
    plan = plan_routed(stored, 1408, 8)
    layer = routed_experts(stored, plan.splits["routed"].padded, 8, 7)
    load_experts(layer, list(padded_weights(as_checkpoint(make_experts(stored, QWEN3_MOE, 1408), QWEN3_MOE), plan)))
    padded = plan.splits["routed"].padded
    assert layer.w13_weight_shape.tolist() == [[padded, HIDDEN]] * EXPERTS
    assert layer.w2_weight_shape.tolist() == [[HIDDEN, padded]] * EXPERTS


def test_padding_of_symmetric_gptq_is_zero_to_marlin() -> None:
    """Marlin takes the zero point of symmetric checkpoints to be 8 and does not read the stored one."""
    plan = plan_routed(quantised.GPTQ, 1408, 4)
    experts = make_experts(quantised.GPTQ, QWEN3_MOE, 1408)
    padded = dict(padded_weights(as_checkpoint(experts, QWEN3_MOE), plan))
    for role, axis in (("gate", 0), ("down", 1)):
        module = f"{QWEN3_MOE.experts}.1.{QWEN3_MOE.name(role)}"
        values = quantised.read_gptq_as_marlin(128, {s: padded[module + s] for s in experts[1, role]})
        original = quantised.GPTQ.read(experts[1, role])
        assert_reassembled([values], original, axis, plan.splits["routed"].padded)


GLM4_MOE = replace(
    QWEN3_MOE, config={**QWEN3_MOE.config, "model_type": "glm4_moe", "n_routed_experts": EXPERTS, "n_shared_experts": 0}
)


def with_gate_and_up_as_one(experts: Mapping[tuple[int, str], Tensors], naming: Naming) -> Weights:
    """Each expert's gate and up as one tensor, which vLLM's layer takes as it does two."""
    one = {}
    for (expert, role), tensors in experts.items():
        for suffix, tensor in tensors.items():
            if role == "gate":
                both = torch.cat([tensor.view(torch.uint8), experts[expert, "up"][suffix].view(torch.uint8)])
                one[f"{naming.experts}.{expert}.gate_up_proj{suffix}"] = both.view(tensor.dtype)
            elif role == "down":
                one[f"{naming.experts}.{expert}.{naming.name(role)}{suffix}"] = tensor
    return list(one.items())


@pytest.mark.parametrize("stored", [quantised.BF16, quantised.FP8_BLOCK], ids=lambda stored: stored.name)
@pytest.mark.parametrize("ranks", [2, 6])
def test_gate_and_up_of_an_expert_in_one_tensor_hold_the_original(stored: Stored, ranks: int) -> None:
    experts = make_experts(stored, GLM4_MOE, 1408)
    plan = plan_shards(facts_of(stored, GLM4_MOE, moe_intermediate_size=1408), ranks)
    weights = list(padded_weights(with_gate_and_up_as_one(experts, GLM4_MOE), plan))
    assert_experts_hold(stored, experts, weights, plan)


def test_vllm_takes_an_expert_of_any_name_without_a_word() -> None:
    """Which is why a name that the patch does not know is refused: rank 1 gets none of its own values."""
    stored, split = quantised.BF16, plan_routed(quantised.BF16, 1408, 6).splits["routed"]
    experts = make_experts(stored, QWEN3_MOE, 1408)
    weights = with_gate_and_up_as_one(experts, QWEN3_MOE)
    layers = [routed_experts(stored, split.padded, 6, rank) for rank in range(6)]
    for layer in layers:
        load_experts(layer, weights)
    held = torch.cat([expert_tensors(layer, 0, "gate", [".weight"])[".weight"] for layer in layers])
    assert not torch.equal(held[:1408], experts[0, "gate"][".weight"])
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_up_proj\.weight: patch 'qwen3_moe' has no such name"):
        list(padded_weights(weights, plan_routed(stored, 1408, 6)))


# Weights that a loaded model is given in place.


class Loaded(torch.nn.Module):
    """A model of one MoE layer, which loads as vLLM's models do."""

    def __init__(self, layer: RoutedExperts) -> None:
        super().__init__()
        self.layer = layer

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        prefix = self.layer.layer_name + "."
        return set(self.layer.load_weights((name.removeprefix(prefix), tensor) for name, tensor in weights))


def loaded_models(stored: Stored, plan: ShardPlan) -> list[Loaded]:
    """The model of every rank, as vLLM's loader hands it over."""
    config = SimpleNamespace(hf_config=SimpleNamespace(ep2tp=note_of(plan, plan.ranks)))
    size = plan.splits["routed"].padded
    models = [Loaded(routed_experts(stored, size, plan.ranks, rank)) for rank in range(plan.ranks)]
    for model in models:
        plugin.load_model(lambda *_, model=model, **__: model, None, (), {"vllm_config": None, "model_config": config})
    return models


@pytest.mark.parametrize("stored", [quantised.BF16, quantised.FP8_BLOCK, quantised.INT4_GROUP32], ids=lambda s: s.name)
@pytest.mark.parametrize("is_padded", [False, True], ids=["as stored", "padded"])
def test_updates_in_place_hold_the_original(stored: Stored, is_padded: bool) -> None:
    """One tensor a call, as a trainer sends them; a checkpoint that ep2tp pads as the engine reads it again passes."""
    plan = plan_routed(stored, 1408, 6)
    experts = make_experts(stored, QWEN3_MOE, 1408)
    weights = as_checkpoint(experts, QWEN3_MOE)
    models = loaded_models(stored, plan)
    for model in models:
        for weight in padded_weights(weights, plan) if is_padded else weights:
            model.load_weights([weight])
    for (expert, role), tensors in experts.items():
        slices = [stored.read(expert_tensors(model.layer, expert, role, tensors)) for model in models]
        assert_reassembled(slices, stored.read(tensors), 1 if role == "down" else 0, plan.splits["routed"].per_rank)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("0.gate_proj.weight", torch.zeros(256, HIDDEN, dtype=torch.bfloat16)),
        ("0.down_proj.weight", torch.zeros(HIDDEN, 1408, dtype=torch.bfloat16, device="meta")),
        ("w13_weight", torch.zeros(EXPERTS, 512, HIDDEN, dtype=torch.bfloat16)),
    ],
    ids=["of a rank", "a stand-in", "of the engine"],
)
def test_updates_that_cannot_be_padded_are_refused(name: str, tensor: torch.Tensor) -> None:
    model = loaded_models(quantised.BF16, plan_routed(quantised.BF16, 1408, 6))[0]
    with pytest.raises(LaunchError, match=rf"{name}.*moe_intermediate_size 1408 -> 1440.*the checkpoint's own names"):
        model.load_weights([(f"{QWEN3_MOE.experts}.{name}", tensor)])


@pytest.mark.parametrize(("size", "ranks"), [(1408, 3), (1408, 6), (2048, 3), (768, 16), (1000, 16)])
@pytest.mark.parametrize("transposed", [False, True], ids=["qwen3_5_moe", "qwen3_vl_moe"])
def test_fused_experts_hold_the_original(transposed: bool, size: int, ranks: int) -> None:
    """All experts of a layer in one tensor, gate and up as its halves: each half is padded at its own tail."""
    model_type = "qwen3_vl_moe" if transposed else "qwen3_5_moe_text"
    naming = replace(QWEN3_MOE, config={**QWEN3_MOE.config, "model_type": model_type})
    experts = make_experts(quantised.BF16, naming, size)

    def stacked(*roles: str) -> torch.Tensor:
        whole = torch.stack([torch.cat([experts[e, role][".weight"] for role in roles]) for e in range(EXPERTS)])
        return whole.transpose(1, 2).contiguous() if transposed else whole

    sizes = {"moe_intermediate_size": size, "shared_expert_intermediate_size": 0}
    plan = plan_shards(facts_of(quantised.BF16, naming, **sizes), ranks)
    fused = [("gate_up_proj", stacked("gate", "up")), ("down_proj", stacked("down"))]
    weights = list(padded_weights([(f"{naming.experts}.{name}", tensor) for name, tensor in fused], plan))
    split = plan.splits["routed"]
    make = partial(routed_experts, quantised.BF16, split.padded, ranks, transposed=transposed)
    layers = [make(rank) for rank in range(ranks)]
    for layer in layers:
        load_experts(layer, weights)
    for (expert, role), tensors in experts.items():
        slices = [expert_tensors(layer, expert, role, tensors)[".weight"].float() for layer in layers]
        assert_reassembled(slices, tensors[".weight"].float(), 1 if role == "down" else 0, split.per_rank)


# Shared experts and dense MLPs.


def make_mlp(stored: Stored, size: int) -> dict[str, Tensors]:
    random = torch.Generator().manual_seed(size)
    return {
        role: stored.make(random, *((HIDDEN, size) if role == "down" else (size, HIDDEN)))
        for role in ("gate", "up", "down")
    }


class Mlp:
    """Gate, up and down of one rank, as vLLM's models build and load them."""

    def __init__(self, stored: Stored, prefix: str, size: int, ranks: int, rank: int) -> None:
        common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": vllm_quantisation(stored)}
        with as_rank(rank, ranks):
            gate_up = [size, size]
            self.gate_up = MergedColumnParallelLinear(HIDDEN, gate_up, prefix=f"{prefix}.gate_up_proj", **common)
            self.down = RowParallelLinear(size, HIDDEN, prefix=f"{prefix}.down_proj", **common)
        poison(self.gate_up)
        poison(self.down)

    def load(self, role: str, suffix: str, tensor: torch.Tensor) -> None:
        parameter = self._parameter(role, suffix)
        shard = () if role == "down" else (0 if role == "gate" else 1,)
        parameter.weight_loader(parameter, tensor, *shard)

    def tensors(self, role: str, suffixes: Iterable[str]) -> Tensors:
        found = {suffix: self._parameter(role, suffix).data for suffix in suffixes if suffix != ".weight_shape"}
        if role == "down":
            return found
        return {suffix: data.chunk(2)[0 if role == "gate" else 1] for suffix, data in found.items()}

    def _parameter(self, role: str, suffix: str) -> Any:
        name = "weight_scale_inv" if suffix == ".scale" else suffix[1:]
        return getattr(self.down if role == "down" else self.gate_up, name)


def check_mlp(stored: Stored, naming: Naming, class_name: str, size: int, plan: ShardPlan) -> None:
    """Check the MLP of one class, ``size`` values as published."""
    mlp = make_mlp(stored, size)
    checkpoint = [
        (naming.module(class_name, role) + suffix, role, suffix, tensor)
        for role, tensors in mlp.items()
        for suffix, tensor in tensors.items()
    ]
    padded = dict(padded_weights(((name, tensor) for name, _, _, tensor in checkpoint), plan))
    split = plan.splits[class_name]  # type: ignore[index]
    assert split.size == size
    ranks = [Mlp(stored, getattr(naming, class_name), split.padded, plan.ranks, rank) for rank in range(plan.ranks)]
    for rank in ranks:
        for name, role, suffix, _ in checkpoint:
            rank.load(role, suffix, padded[name])
    for role, tensors in mlp.items():
        slices = [stored.read(rank.tensors(role, tensors)) for rank in ranks]
        assert_reassembled(slices, stored.read(tensors), 1 if role == "down" else 0, split.per_rank)


@pytest.mark.parametrize(("size", "ranks"), LINEAR_SHAPES)
@pytest.mark.parametrize("stored", LINEAR_FORMATS, ids=lambda stored: stored.name)
def test_dense_mlps_hold_the_original(stored: Stored, size: int, ranks: int) -> None:
    facts = facts_of(stored, DEEPSEEK_V3, moe_intermediate_size=6144, intermediate_size=size)  # experts divide
    check_mlp(stored, DEEPSEEK_V3, "dense", size, plan_shards(facts, ranks))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("size", "ranks"), [(1408, 2), (1408, 8), (768, 8), (1536, 6)])
@pytest.mark.parametrize("stored", LINEAR_FORMATS, ids=lambda stored: stored.name)
def test_shared_experts_hold_the_original(stored: Stored, size: int, ranks: int, count: int) -> None:
    """Shared experts are stored as one MLP of ``count`` times the routed experts' size, padded by the same field."""
    sizes = {"moe_intermediate_size": size, "n_shared_experts": count, "intermediate_size": 1024}
    plan = plan_shards(facts_of(stored, DEEPSEEK_V3, **sizes), ranks)
    assert plan.splits["shared"].padded == count * plan.splits["routed"].padded
    check_mlp(stored, DEEPSEEK_V3, "shared", count * size, plan)


@pytest.mark.parametrize(("size", "ranks"), [(2048, 3), (2048, 6), (3072, 16), (2048, 32)])
def test_deepseek_v4_shared_experts_hold_the_original(size: int, ranks: int) -> None:
    """FP8 blocks with E8M0 scales beside MXFP4 routed experts: the field grows for both."""
    config = quantised.DEEPSEEK_V4_MXFP4.quantization
    stored = replace(quantised.fp8_block(".scale", exponents=True), name="deepseek_v4_fp8", quantization=config)
    plan = plan_shards(facts_of(stored, DEEPSEEK_V4, moe_intermediate_size=size, n_shared_experts=1), ranks)
    assert [c.format_names for c in plan.facts.classes] == ["mxfp4", "fp8_block128"]
    check_mlp(stored, DEEPSEEK_V4, "shared", size, plan)


# Without ep2tp.


@pytest.mark.parametrize(
    ("stored", "size", "ranks", "first"),
    [
        (quantised.DEEPSEEK_V4_MXFP4, 1408, 8, 16),
        (quantised.DEEPSEEK_V4_MXFP4, 2304, 16, 16),
        (quantised.COMPRESSED_MXFP4, 2304, 16, 16),
        (quantised.COMPRESSED_NVFP4, 1408, 16, 8),
    ],
    ids=["mxfp4-1408-8", "mxfp4-2304-16", "compressed_mxfp4-2304-16", "nvfp4-1408-16"],
)
def test_vllm_alone_loads_wrong_scales_in_silence(stored: Stored, size: int, ranks: int, first: int) -> None:
    """The loaders floor-divide the scales' axis: ``first`` columns of rank 0 and all of the last rank are wrong."""
    naming = naming_of(stored)
    experts = make_experts(stored, naming, size)
    wrong = []
    for rank in (0, ranks - 1):
        layer = routed_experts(stored, size, ranks, rank)
        load_experts(layer, as_checkpoint(experts, naming))
        width = size // ranks
        original = stored.read(experts[0, "down"]).narrow(1, rank * width, width)
        held = read_with_missing_scales(stored, expert_tensors(layer, 0, "down", experts[0, "down"]), width)
        wrong.append(int((held != original).any(0).sum()))
    assert wrong == [first, size // ranks]


def read_with_missing_scales(stored: Stored, tensors: Tensors, width: int) -> torch.Tensor:
    """The first ``width`` columns; a scale that the engine did not even make room for counts as 0."""
    weight = next(suffix for suffix in tensors if suffix in (".weight", ".weight_packed"))
    scale = next(suffix for suffix in tensors if suffix in (".weight_scale", ".scale"))
    zeros = torch.zeros(HIDDEN, 1, dtype=torch.uint8).view(tensors[scale].dtype)
    tensors = {**tensors, weight: tensors[weight][:, : width // 2].contiguous()}
    tensors[scale] = torch.cat([tensors[scale].view(torch.uint8), zeros.view(torch.uint8)], 1).view(zeros.dtype)
    return stored.read(tensors)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (quantised.COMPRESSED_FP8_BLOCK, "not divisible by weight quantization block"),
        (quantised.INT4_GROUP32, "divisible by group_size"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_vllm_alone_refuses_what_it_checks(stored: Stored, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routed_experts(stored, 1408, 8, 0)


# What the checkpoint must be.


def stream(stored: Stored, size: int, **changed: torch.Tensor | None) -> Weights:
    """A checkpoint in which expert 1's down projection has other tensors, or lacks those that are None."""
    naming = naming_of(stored)
    experts = make_experts(stored, naming, size)
    for name, tensor in changed.items():
        if tensor is None:
            del experts[1, "down"][f".{name}"]
        else:
            experts[1, "down"][f".{name}"] = tensor
    return as_checkpoint(experts, naming)


DOWN = re.escape("model.layers.0.mlp.experts.1.down_proj")


@pytest.mark.parametrize(
    ("stored", "changed", "message"),
    [
        (quantised.FP8_BLOCK, {"weight_scale_inv": None}, rf"{DOWN}: no .*weight_scale_inv"),
        (quantised.COMPRESSED_FP8_CHANNEL, {"weight_scale": None}, rf"{DOWN}: no .weight_scale"),
        (quantised.COMPRESSED_MXFP4, {"weight_scale": None}, rf"{DOWN}: no .*weight_scale"),
        (quantised.INT4_GROUP32, {"weight_scale": None}, rf"{DOWN}: no .weight_scale"),
        (quantised.MODELOPT_NVFP4, {"weight_scale": None}, rf"{DOWN}: no .weight_scale "),
        (quantised.MODELOPT_NVFP4, {"weight_scale_2": None}, rf"{DOWN}: no .weight_scale_2"),
        (quantised.COMPRESSED_NVFP4, {"weight_global_scale": None}, rf"{DOWN}: no .*weight_global_scale"),
        (quantised.AWQ, {"scales": None}, rf"{DOWN}: no .scales"),
        (quantised.AWQ, {"qzeros": None}, rf"{DOWN}: no .qzeros"),
        (quantised.GPTQ, {"qzeros": None}, rf"{DOWN}: no .qzeros"),
        (quantised.FP8_BLOCK, {"weight_scale_inv": torch.ones(4, 22)}, rf"{DOWN}.weight_scale_inv: shape \[4, 22\]"),
        (quantised.FP8_BLOCK, {"weight_scale_inv": torch.ones(2, 12)}, rf"{DOWN}.weight_scale_inv: shape \[2, 12\]"),
        (
            quantised.INT4_GROUP32,
            {"weight_scale": torch.ones(HIDDEN, 11, dtype=torch.bfloat16)},
            rf"{DOWN}.weight_scale: shape \[256, 11\]",
        ),
        (
            quantised.BF16,
            {"weight": torch.zeros(1, HIDDEN, 1408, dtype=torch.bfloat16)},
            rf"{DOWN}.weight: shape \[1, 256, 1408\] has 3 axes",
        ),
        (quantised.BF16, {"weight": torch.zeros(HIDDEN, 1400)}, rf"{DOWN}.weight: shape \[256, 1400\]"),
        (quantised.BF16, {"weight": torch.zeros(1408, HIDDEN)}, rf"{DOWN}.weight: shape \[1408, 256\]"),
        (
            quantised.FP8_BLOCK,
            {"weight": torch.zeros(HIDDEN, 1408, dtype=torch.int8)},
            rf"{DOWN}.weight: dtype I8; .* F8_E4M3",
        ),
        (
            quantised.FP8_BLOCK,
            {"weight": torch.zeros(HIDDEN, 1408).to(torch.float8_e5m2)},
            rf"{DOWN}.weight: dtype float8_e5m2",
        ),
        (
            quantised.MODELOPT_NVFP4,
            {"weight_scale": torch.ones(HIDDEN, 88)},
            rf"{DOWN}.weight_scale: dtype F32; .* F8_E4M3",
        ),
        (
            quantised.INT4_GROUP32,
            {"weight_g_idx": torch.zeros(1408, dtype=torch.int32)},
            rf"{DOWN}.weight_g_idx: .*actorder",
        ),
        (
            quantised.INT4_GROUP32,
            {"weight_zero_point": torch.zeros(HIDDEN // 8, 44, dtype=torch.int32)},
            rf"{DOWN}.weight_zero_point: .*asymmetric",
        ),
        (quantised.FP8_BLOCK, {"weight_bias_scale": torch.ones(1)}, rf"{DOWN}.weight_bias_scale: .* no tensor"),
        (
            quantised.GPTQ,
            {"g_idx": torch.arange(1408, dtype=torch.int32).flip(0) // 128},
            rf"{DOWN}.g_idx: .*groups of 128",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Stored) else "-".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    stored: Stored, changed: dict[str, torch.Tensor | None], message: str
) -> None:
    plan = plan_routed(stored, 1408, 6)
    assert plan.is_padded
    with pytest.raises(CheckpointError, match=message):
        list(padded_weights(stream(stored, 1408, **changed), plan))


def test_weights_whose_names_no_patch_knows_are_refused() -> None:
    """vLLM would load them unpadded into a padded model without a word."""
    renamed = [(f"llm.{name}", tensor) for name, tensor in stream(quantised.BF16, 1408)]
    with pytest.raises(CheckpointError, match=r"llm\.model\..*: patch 'qwen3_moe' has no such name"):
        list(padded_weights(renamed, plan_routed(quantised.BF16, 1408, 6)))
    with pytest.raises(CheckpointError, match=r"no tensor has a name that patch 'qwen3_moe' knows for routed"):
        list(padded_weights([("lm_head.weight", torch.zeros(2, 2))], plan_routed(quantised.BF16, 1408, 6)))


def test_scales_may_come_before_and_long_after_their_weights() -> None:
    weights = stream(quantised.FP8_BLOCK, 1408)
    plan = plan_routed(quantised.FP8_BLOCK, 1408, 8)
    assert len(list(padded_weights(weights[::-1], plan))) == len(weights)
    assert len(list(padded_weights(sorted(weights, key=lambda item: item[0][-9:]), plan))) == len(weights)


def test_weights_kept_unquantised_need_no_scales() -> None:
    """MTP layers of NVFP4 checkpoints are BF16 although the config does not say so."""
    plan = plan_routed(quantised.MODELOPT_NVFP4, 1408, 6)
    padded = list(padded_weights(stream(quantised.BF16, 1408), plan))
    assert {tuple(tensor.shape) for _, tensor in padded} == {(1536, HIDDEN), (HIDDEN, 1536)}


def test_other_tensors_and_exact_plans_pass_through_untouched() -> None:
    others = [("model.embed_tokens.weight", torch.zeros(3)), ("model.layers.0.mlp.gate.weight", torch.zeros(2, 7))]
    for stored in ROUTED_FORMATS:
        for size, ranks in ((1408, 1), (2048, 2)):
            weights = [*stream(stored, size), *others]
            plan = plan_routed(stored, size, ranks)
            assert not plan.is_padded
            passed = list(padded_weights(weights, plan))
            assert [(name, id(tensor)) for name, tensor in passed] == [(name, id(tensor)) for name, tensor in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_scales_of_every_dtype_keep_their_bytes(dtype: torch.dtype) -> None:
    scales = torch.tensor([[2.0**k for k in range(-5, 6)]] * 2).to(dtype)
    plan = plan_routed(quantised.FP8_BLOCK, 1408, 2)
    place = plan.tensor("model.layers.0.mlp.experts.0.down_proj.weight_scale_inv", (2, 11), safetensors_dtype(scales))
    assert place is not None
    padded = pad(scales, place)
    assert padded.dtype == dtype and padded.shape == (2, 12)
    assert torch.equal(padded[:, :11].contiguous().view(torch.uint8), scales.view(torch.uint8))
    assert padded[:, 11].float().tolist() == [1.0, 1.0]
