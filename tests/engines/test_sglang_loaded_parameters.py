"""SGLang's parameters after loading, bit for bit.

For each format and shape: random checkpoint tensors go through ``padded_weights`` and then, for each rank, through the
weight loaders of the real layers (``FusedMoE``, ``MergedColumnParallelLinear``, ``RowParallelLinear``) with the
parameters that the real quantisation methods create, on the path that SGLang takes on GPUs. Dequantised, put together
and cut to the unpadded size, the ranks' parameters are the dequantised original, and the padding is zero. Nothing runs
after the loaders, which is where kernels would repack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.layers import linear, parameter
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton import layer as moe_layer
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import get_quantization_config, modelopt_quant, mxfp4
from sglang.srt.layers.quantization.awq import awq
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.model_executor.model_runner_components.weight_updater import FlattenedTensorBucket, WeightUpdater
from sglang.srt.runtime_context import get_context, get_parallel

from ep2tp.engines.padding import note_of
from ep2tp.engines.sglang import worker
from ep2tp.engines.sglang.experts import multiples
from ep2tp.engines.sglang.note import LaunchNote
from ep2tp.engines.weights import padded_weights
from ep2tp.errors import LaunchError
from ep2tp.model.facts import ModelFacts, read_facts
from ep2tp.model.families import find_family, load_families
from ep2tp.model.sharding import ShardPlan, plan_shards
from tests import quantised
from tests.quantised import Stored, Tensors

HIDDEN, EXPERTS = 256, 2
SHARED, DENSE = "model.layers.1.mlp.shared_experts", "model.layers.0.mlp"
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 48,
    "kv_lora_rank": 512,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "vocab_size": 1024,
}
DEEPSEEK_V4 = {**CONFIG, "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"]}
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
    quantised.MXFP8,
]
ROUTED_FORMATS = [
    *LINEAR_FORMATS,
    quantised.COMPRESSED_MXFP4,
    quantised.DEEPSEEK_V4_MXFP4,
    quantised.GPTQ,
    quantised.AWQ,
]
SHAPES = [(1408, 2), (1408, 3), (1408, 8), (1536, 8), (1536, 16), (768, 8), (2304, 16), (2048, 6)]
FLIPPED = (quantised.INT4_GROUP32, quantised.INT4_GROUP128)  # SGLang keeps their weights and scales [columns, rows]
QUANTISATION_NAMES = {"modelopt": "modelopt_fp4", "gptq": "moe_wna16", "awq": "awq_marlin"}
NAMES_IN_SGLANG = {  # where a model's load_weights renames a suffix
    quantised.COMPRESSED_MXFP4.name: {".weight_packed": ".weight"},
    quantised.DEEPSEEK_V4_MXFP4.name: {".scale": ".weight_scale_inv"},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the loaders' path for GPUs: on CPUs SGLang pads for itself, and loads what is short."""
    for module in (moe_layer, linear, parameter):
        monkeypatch.setattr(module, "_is_cpu", False)
    # The schemes of a Hopper GPU: those of Blackwell ask for FlashInfer's runners.
    monkeypatch.setattr(CompressedTensorsConfig, "_check_scheme_supported", lambda _, least, **kwargs: least <= 90)
    # The only NVFP4 runner that does not ask which GPU this is; it adds no padding of its own.
    monkeypatch.setattr(modelopt_quant, "get_moe_runner_backend", lambda: MoeRunnerBackend.MARLIN)
    monkeypatch.setattr(awq, "verify_marlin_supported", lambda *args, **kwargs: None)  # by this GPU


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Make SGLang believe that this process is one of a tensor-parallel group. Nothing communicates."""
    published = get_context().override_server_args(model_path="dummy", tp_size=ranks, device="cpu")
    group = SimpleNamespace(device="cpu", rank_in_group=rank, world_size=ranks)
    with published, get_parallel().override(tp_rank=rank, moe_tp_rank=rank, moe_ep_rank=0, tp_group=group):
        yield


def sglang_quantisation(stored: Stored, name: str | None = None) -> Any:
    """SGLang's config for a checkpoint; ``name`` is what ``--quantization`` says."""
    if stored.quantization is None:
        return None
    method = stored.quantization["quant_method"]
    name = name or QUANTISATION_NAMES.get(method, method)
    config = get_quantization_config(name).from_config(dict(stored.quantization))
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # as SGLang's model loader does
    if stored is quantised.DEEPSEEK_V4_MXFP4:
        config.is_fp4_experts = True  # likewise
    return config


def facts_of(stored: Stored, **sizes: int) -> ModelFacts:
    base = DEEPSEEK_V4 if stored is quantised.DEEPSEEK_V4_MXFP4 else CONFIG
    config: dict[str, Any] = {**base, "n_shared_experts": 0, "intermediate_size": 2048, **sizes}
    if stored.quantization is not None:
        config["quantization_config"] = stored.quantization
    found = find_family(config, load_families())
    assert found is not None
    return read_facts(config, *found, "test")


def make_mlp(stored: Stored, size: int, seed: int = 0) -> dict[str, Tensors]:
    random = torch.Generator().manual_seed(size + seed)
    return {
        role: stored.make(random, *((HIDDEN, size) if role == "down" else (size, HIDDEN)))
        for role in ("gate", "up", "down")
    }


def as_checkpoint(mlp: Mapping[str, Tensors], module: str) -> Weights:
    return [(f"{module}.{role}_proj{suffix}", t) for role, tensors in mlp.items() for suffix, t in tensors.items()]


def routed_names(stored: Stored) -> tuple[str, Mapping[str, str]]:
    """The module of the routed experts in a checkpoint, and the names of the projections."""
    if stored is quantised.DEEPSEEK_V4_MXFP4:
        return "layers.1.ffn.experts", {"gate": "w1", "down": "w2", "up": "w3"}
    return "model.layers.1.mlp.experts", {role: f"{role}_proj" for role in ("gate", "down", "up")}


def routed_checkpoint(stored: Stored, experts: Iterable[Mapping[str, Tensors]]) -> Weights:
    module, names = routed_names(stored)
    return [
        (f"{module}.{expert}.{names[role]}{suffix}", tensor)
        for expert, mlp in enumerate(experts)
        for role, tensors in mlp.items()
        for suffix, tensor in tensors.items()
    ]


def poison(layer: torch.nn.Module) -> None:
    """Fill every parameter with bytes that dequantise to wrong values, so that what is not loaded is noticed."""
    for p in layer.parameters():
        p.data.view(torch.uint8).fill_(0xFF)


def assert_reassembled(slices: list[torch.Tensor], original: torch.Tensor, axis: int, per_rank: int) -> None:
    """Check that the dequantised slices are the original, bit for bit, and zeros after its end.

    ``per_rank`` values of the axis are planned for each rank; what SGLang adds to a slice for a kernel is zero, too.
    """
    for part in slices:
        assert not part.narrow(axis, per_rank, part.shape[axis] - per_rank).any()
    whole = torch.cat([part.narrow(axis, 0, per_rank) for part in slices], axis)
    size = original.shape[axis]
    held = whole.narrow(axis, 0, size).contiguous().view(torch.int32)
    assert torch.equal(held, original.contiguous().view(torch.int32))
    assert not whole.narrow(axis, size, whole.shape[axis] - size).any()


# Routed experts.


class Experts:
    """SGLang's layer for one rank of a model whose config says ``size``."""

    def __init__(self, stored: Stored, size: int, rank: int, ranks: int, quantisation: str | None = None) -> None:
        self.stored = stored
        self.prefix, names = routed_names(stored)
        self.mapping = FusedMoE.make_expert_params_mapping(names["gate"], names["down"], names["up"], EXPERTS)
        with as_rank(rank, ranks):
            self.layer = FusedMoE(
                num_experts=EXPERTS,
                hidden_size=HIDDEN,
                intermediate_size=size,
                layer_id=1,
                top_k=1,
                params_dtype=torch.bfloat16,
                quant_config=sglang_quantisation(stored, quantisation),
                prefix=self.prefix,
            )
            assert not self.layer.use_padded_loading
        poison(self.layer)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load as SGLang's models do, by SGLang's own mapping of names."""
        parameters = dict(self.layer.named_parameters())
        for name, tensor in weights:
            found = next(m for m in self.mapping if m[1] in name)
            parameter_name, weight_name, expert, shard = found
            for before, after in NAMES_IN_SGLANG.get(self.stored.name, {}).items():
                name = name.removesuffix(before) + after if name.endswith(before) else name
            name = name.replace(weight_name, parameter_name)
            target = parameters[name.removeprefix(self.prefix + ".")]
            target.weight_loader(target, tensor, name, shard_id=shard, expert_id=expert)

    def values(self, expert: int, role: str, suffixes: Iterable[str]) -> torch.Tensor:
        """One expert's matrix as this rank holds it, dequantised."""
        found = {}
        for suffix in suffixes:
            if suffix in (".weight_shape", ".qzeros") and self.stored is not quantised.AWQ:
                continue
            name = NAMES_IN_SGLANG.get(self.stored.name, {}).get(suffix, suffix)
            data = getattr(self.layer, f"{'w2' if role == 'down' else 'w13'}_{name[1:]}").data[expert]
            if self.stored in FLIPPED:
                data = data.t().contiguous()
            if role != "down":
                index = 0 if role == "gate" else 1
                rows = 1 if self.stored is quantised.AWQ else 0
                data = data[index] if data.shape == (2,) else data.chunk(2, rows)[index]  # a number, or half the rows
            if self.stored is quantised.DEEPSEEK_V4_MXFP4 and suffix == ".scale":
                data = data.to(torch.float8_e8m0fnu)  # kept as float32; powers of two in both
            found[suffix] = data
        return read_wna16(found) if self.stored is quantised.GPTQ else self.stored.read(found)


def read_wna16(tensors: Tensors) -> torch.Tensor:
    """GPTQ as SGLang's MoeWNA16 keeps it: [rows, columns], two values to a byte, each offset by 8."""
    packed = tensors[".qweight"]
    values = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float() - 8
    scales = tensors[".scales"]
    return values * scales.float().repeat_interleave(values.shape[1] // scales.shape[1], 1)


def plan_routed(stored: Stored, size: int, ranks: int) -> ShardPlan:
    facts = facts_of(stored, moe_intermediate_size=size)
    return plan_shards(facts, ranks, multiples=multiples(facts))


def check_routed(stored: Stored, size: int, ranks: int) -> None:
    experts = [make_mlp(stored, size, expert) for expert in range(EXPERTS)]
    plan = plan_routed(stored, size, ranks)
    weights = list(padded_weights(routed_checkpoint(stored, experts), plan))
    split = plan.splits["routed"]
    layers = [Experts(stored, split.padded, rank, ranks) for rank in range(ranks)]
    for rank, layer in enumerate(layers):
        with as_rank(rank, ranks):
            layer.load(weights)
    for expert, mlp in enumerate(experts):
        for role, tensors in mlp.items():
            slices = [layer.values(expert, role, tensors) for layer in layers]
            assert_reassembled(slices, stored.read(tensors), 1 if role == "down" else 0, split.per_rank)


@pytest.mark.parametrize(("size", "ranks"), SHAPES)
@pytest.mark.parametrize("stored", ROUTED_FORMATS, ids=lambda stored: stored.name)
def test_routed_experts_hold_the_original(stored: Stored, size: int, ranks: int) -> None:
    check_routed(stored, size, ranks)


class Loaded(torch.nn.Module):
    """A model of one MoE layer, in a runner that has just loaded it."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.experts.load(weights)


@pytest.mark.parametrize("stored", [quantised.BF16, quantised.FP8_BLOCK], ids=lambda stored: stored.name)
def test_updates_in_place_hold_the_original(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SGLang's own updater, which calls the model with the checkpoint's tensors, some at a time."""
    plan, ranks = plan_routed(stored, 1408, 6), 6
    experts = [make_mlp(stored, 1408, expert) for expert in range(EXPERTS)]
    weights = routed_checkpoint(stored, experts)
    note = LaunchNote(rewritten=False, model="the model", padding=note_of(plan, ranks), launcher="another process")
    monkeypatch.setattr(worker, "state", worker.State(note, joined=True))
    models = [Loaded(Experts(stored, plan.splits["routed"].padded, rank, ranks)) for rank in range(ranks)]
    for rank, model in enumerate(models):
        config = SimpleNamespace(model_path="the model")
        worker.load_model(lambda: None, SimpleNamespace(model=model, is_draft_worker=True, model_config=config), (), {})
        updater = SimpleNamespace(get_model=lambda model=model: model)
        with as_rank(rank, ranks):
            for weight in weights:
                WeightUpdater._update_weights_from_flattened_bucket(updater, bucket_of(weight))
            with pytest.raises(LaunchError, match=r"w13_weight: .*the checkpoint's own names"):
                model.load_weights([(weights[0][0].partition(".0.")[0] + ".w13_weight", weights[0][1])])
    for expert, mlp in enumerate(experts):
        for role, tensors in mlp.items():
            slices = [model.experts.values(expert, role, tensors) for model in models]
            assert_reassembled(slices, stored.read(tensors), 1 if role == "down" else 0, plan.splits["routed"].per_rank)


def bucket_of(weight: tuple[str, torch.Tensor]) -> dict[str, Any]:
    """What a trainer sends: tensors one after the other, and where each of them is."""
    bucket = FlattenedTensorBucket(named_tensors=[weight])
    return {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}


@pytest.mark.parametrize(("size", "ranks"), [(1408, 2), (1408, 3), (2304, 16)])
def test_slices_that_marlin_widens_hold_the_original(size: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For MXFP4, SGLang rounds Marlin's slices up to 128 values, and fills only what the checkpoint has."""
    monkeypatch.setattr(mxfp4, "get_moe_runner_backend", lambda: MoeRunnerBackend.MARLIN)
    check_routed(quantised.COMPRESSED_MXFP4, size, ranks)


# Shared experts and dense MLPs.


class Mlp:
    """Gate, up and down of one rank, as SGLang's models build and load them."""

    def __init__(self, stored: Stored, prefix: str, size: int, rank: int, ranks: int) -> None:
        common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": sglang_quantisation(stored)}
        with as_rank(rank, ranks):
            self.gate_up = MergedColumnParallelLinear(HIDDEN, [size, size], prefix=f"{prefix}.gate_up_proj", **common)
            self.down = RowParallelLinear(size, HIDDEN, prefix=f"{prefix}.down_proj", **common)
        poison(self.gate_up)
        poison(self.down)

    def load(self, role: str, suffix: str, tensor: torch.Tensor) -> None:
        target = self._parameter(role, suffix)
        shard = () if role == "down" else (0 if role == "gate" else 1,)
        target.weight_loader(target, tensor, *shard)

    def values(self, stored: Stored, role: str, suffixes: Iterable[str]) -> torch.Tensor:
        found = {suffix: self._parameter(role, suffix).data for suffix in suffixes if suffix != ".weight_shape"}
        if role != "down":
            found = {suffix: data.chunk(2)[0 if role == "gate" else 1] for suffix, data in found.items()}
        return stored.read(found)

    def _parameter(self, role: str, suffix: str) -> Any:
        return getattr(self.down if role == "down" else self.gate_up, suffix[1:])


@pytest.mark.parametrize("class_name", ["dense", "shared"])
@pytest.mark.parametrize(("size", "ranks"), SHAPES)
@pytest.mark.parametrize("stored", LINEAR_FORMATS, ids=lambda stored: stored.name)
def test_other_mlps_hold_the_original(stored: Stored, size: int, ranks: int, class_name: str) -> None:
    """Two shared experts are stored as one MLP of twice the routed experts' size, padded by the same field."""
    is_dense = class_name == "dense"
    sizes = {"moe_intermediate_size": 2048, "intermediate_size": size}
    if not is_dense:
        sizes = {"moe_intermediate_size": size, "n_shared_experts": 2}
    stored_size, prefix = (size, DENSE) if is_dense else (2 * size, SHARED)
    plan = plan_shards(facts_of(stored, **sizes), ranks)
    mlp = make_mlp(stored, stored_size)
    padded = dict(padded_weights(as_checkpoint(mlp, prefix), plan))
    split = plan.splits[class_name]  # type: ignore[index]
    assert split.size == stored_size
    layers = [Mlp(stored, prefix, split.padded, rank, ranks) for rank in range(ranks)]
    for layer in layers:
        for role, tensors in mlp.items():
            for suffix in tensors:
                layer.load(role, suffix, padded[f"{prefix}.{role}_proj{suffix}"])
    for role, tensors in mlp.items():
        slices = [layer.values(stored, role, tensors) for layer in layers]
        assert_reassembled(slices, stored.read(tensors), 1 if role == "down" else 0, split.per_rank)


# Without ep2tp.


@pytest.mark.parametrize(
    ("stored", "size", "ranks", "lost"),
    [
        (quantised.INT4_GROUP128, 1536, 8, 128),
        (quantised.MODELOPT_NVFP4, 704, 8, 16),
        (quantised.COMPRESSED_NVFP4, 704, 8, 16),
        (quantised.COMPRESSED_MXFP4, 2304, 16, 32),
    ],
    ids=["int4-192-a-rank", "nvfp4-88-a-rank", "compressed-nvfp4-88-a-rank", "compressed-mxfp4-144-a-rank"],
)
def test_sglang_alone_loads_wrong_scales_in_silence(stored: Stored, size: int, ranks: int, lost: int) -> None:
    """The last rank's slice begins within a group, and has room for one scale too few: no error, wrong values."""
    experts = [make_mlp(stored, size, expert) for expert in range(EXPERTS)]
    layer = Experts(stored, size, ranks - 1, ranks)
    layer.load(routed_checkpoint(stored, experts))
    per_rank = size // ranks
    scales = layer.layer.w2_weight_scale.data[0]
    assert scales.shape[0 if stored in FLIPPED else 1] == per_rank // lost  # 1.5, 5.5 or 4.5 groups, rounded down
    original = experts[0]["down"][".weight_scale"].float()
    held = (scales.t() if stored in FLIPPED else scales).float()
    first = per_rank * (ranks - 1) // lost  # the group of this rank's first column
    assert not torch.equal(held, original[:, first : first + held.shape[1]])


def test_sglang_alone_gives_gptq_room_for_the_scales_of_all_ranks() -> None:
    """Why ep2tp refuses Marlin for GPTQ: the kernel divides a slice's columns by the scales, 1024 by 16 here."""
    size, ranks, group = 2048, 2, 128
    experts = [make_mlp(quantised.GPTQ, size, expert) for expert in range(EXPERTS)]
    layer = Experts(quantised.GPTQ, size, 1, ranks, quantisation="gptq_marlin")
    layer.load(routed_checkpoint(quantised.GPTQ, experts))
    held, original = layer.layer.w2_scales.data[0], experts[0]["down"][".scales"]
    columns = 8 * layer.layer.w2_qweight.shape[1]
    own = columns // group
    assert (columns // held.shape[0], own) == (64, 8)
    assert torch.equal(held[:own], original[own:].half())
    assert not held[own:].any()


def test_sglang_alone_refuses_fp8_blocks_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"= 704 is not divisible by weight quantization block_n = 128"):
        Experts(quantised.FP8_BLOCK, 1408, 0, 2)
