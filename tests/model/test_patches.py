"""The patch files: that they load, match the right models, and name what published checkpoints and configs hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ep2tp.errors import CheckpointError, PatchError
from ep2tp.model.facts import ModelFacts, is_moe, read_facts
from ep2tp.model.families import ClassName, Family, Role, Size, find_family, load_families, load_family
from ep2tp.model.sharding import plan_shards

PATCHES = Path(__file__).parents[2] / "ep2tp" / "patches"
MODELS = json.loads((Path(__file__).parents[1] / "data" / "models.json").read_text(encoding="utf-8"))["models"]
FAMILIES = load_families()

EXPECTED = {
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V2-Lite": "deepseek_v2",
    "DeepSeek-V3/R1/V3.1": "deepseek_v3",
    "DeepSeek-V3.2(-Exp)": "deepseek_v32",
    "DeepSeek-V4-Flash": "deepseek_v4",
    "DeepSeek-V4-Pro": "deepseek_v4",
    "DeepSeek-V4.1-Flash": "deepseek_v41",
    "Kimi-K2-Instruct": "kimi_k2",
    "Kimi-K2-Thinking": "kimi_k2",
    "Kimi-K2.5/2.6/2.7-Code": "kimi_k25",
    "Kimi-K3": "kimi_k3",
    "Kimi-Linear-48B-A3B": "kimi_linear",
    "Moonlight-16B-A3B": "deepseek_v3",
    "Kimi-VL-A3B": "deepseek_v3",
    "GLM-4.5/4.6/4.7": "glm4_moe",
    "GLM-4.5-Air": "glm4_moe",
    "GLM-4.7-Flash": "glm4_moe_lite",
    "GLM-5/5.1/5.2/5.3": "glm_moe_dsa",
    "Qwen3-235B-A22B": "qwen3_moe",
    "Qwen3-30B-A3B": "qwen3_moe",
    "Qwen3-Coder-480B": "qwen3_moe",
    "Qwen3-Next-80B": "qwen3_next",
    "Qwen3.5-397B-A17B": "qwen3_5_moe",
    "Qwen3.5-122B-A10B": "qwen3_5_moe",
    "Qwen3.5/3.6-35B-A3B": "qwen3_5_moe",
    "Qwen3.8-2.4T-A95B": "qwen3_5_moe",
    "MiniMax-M2/M2.1/M2.5/M2.7": "minimax_m2",
    "MiniMax-M3": "minimax_m3",
    "gpt-oss-120b": "gpt_oss",
    "Llama-4-Maverick": "llama4",
    "Llama-4-Scout": "llama4",
    "LongCat-Flash": "longcat_flash",
    "Step-3.5/3.7-Flash": "step3p5",
    "MiMo-V2-Flash/V2.5": "mimo_v2",
    "MiMo-V2.5-Pro": "mimo_v2",
    "ERNIE-4.5-300B-A47B": "ernie4_5_moe",
    "ERNIE-4.5-21B-A3B": "ernie4_5_moe",
}
OWN_SHARED_SIZE = 512  # of families whose shared experts have a size field of their own
DENSE_SIZE = 12288


def config_of(name: str, family: Family, alias: int = 0) -> dict[str, Any]:
    """A config.json with the model's names and sizes, in the fields that the patch reads.

    Args:
        name: a model of models.json.
        family: the patch.
        alias: which name to use of fields that have several.
    """
    model, fields = MODELS[name], family.fields

    def pick(names: tuple[str, ...]) -> str:
        return names[min(alias, len(names) - 1)]

    sizes = {
        pick(fields.layers): model["layers"],
        pick(fields.hidden): model["hidden_size"],
        pick(fields.kv_heads): model["kv_heads"],
        "num_attention_heads": model["heads"],
        pick(fields.experts): model["experts"],
        pick(fields.top_k): model["top_k"],
    }
    if fields.expert_hidden:
        sizes[pick(fields.expert_hidden)] = model["expert_hidden"]
    for size in (fields.dense, fields.shared):
        if size is not None:
            sizes[pick(size.field)] = DENSE_SIZE if size is fields.dense else OWN_SHARED_SIZE
            for only_if in size.only_if or ():
                sizes[only_if] = [0]
    if fields.shared is not None and fields.shared.times:
        sizes[pick(fields.shared.times)] = model["shared_experts"]
    sizes[pick(fields.routed.field)] = model["expert_size"]
    names = {key: model[key] for key in ("architectures", "model_type") if model[key]}
    return {**names, "text_config": {**model["text"], **sizes}} if "text" in model else {**names, **sizes}


def tensor_names(family: Family) -> Iterator[tuple[str, ClassName, Role]]:
    """Every matrix name of a patch under every prefix, layer 3 and expert 7."""
    for class_name in ("routed", "shared", "dense"):
        if (tensors := getattr(family.tensors, class_name)) is None:
            continue
        for role in ("gate", "up", "gate_up", "down"):
            for name in getattr(tensors, role):
                for prefix in family.tensors.prefixes:
                    yield prefix + name.format(layer=3, expert=7), class_name, role  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(PATCHES.glob("*.toml")), ids=lambda path: path.stem)
def test_patch_loads_and_is_named_like_its_file(path: Path) -> None:
    family = load_family(path)
    assert family.name == path.stem
    assert family.checked["vllm"], "no version was checked"
    assert all(link.startswith("https://") for link in family.ledger.upstream)
    assert set(family.checked["vllm"]) <= {"0.25.1", "0.28.0", "0.32.0", "0.33.0"}


def test_every_built_in_patch_is_expected_by_a_model() -> None:
    assert set(EXPECTED.values()) == set(FAMILIES)
    assert set(EXPECTED) == set(MODELS)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_of_a_patchs_own_names_classifies_as_itself(name: str) -> None:
    for tensor, class_name, role in tensor_names(FAMILIES[name]):
        matrix = FAMILIES[name].classify(tensor + ".weight")
        assert matrix is not None, tensor
        assert (matrix.class_name, matrix.role, matrix.suffix) == (class_name, role, ".weight"), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_and_tensors_name_the_same_classes(name: str) -> None:
    family = FAMILIES[name]
    for class_name in ("routed", "shared", "dense"):
        assert (getattr(family.fields, class_name) is None) == (getattr(family.tensors, class_name) is None)


@pytest.mark.parametrize("name", MODELS)
def test_model_is_matched_by_its_patch_alone(name: str) -> None:
    config = config_of(name, FAMILIES[EXPECTED[name]])
    found = find_family(config, FAMILIES)
    assert found is not None
    assert found[0].name == EXPECTED[name]
    assert is_moe(config)


@pytest.mark.parametrize("alias", [0, 1], ids=["published", "alias"])
@pytest.mark.parametrize("name", MODELS)
def test_facts_give_back_the_models_numbers(name: str, alias: int) -> None:
    family, model = FAMILIES[EXPECTED[name]], MODELS[name]
    facts = read_facts(config_of(name, family, alias), family, "test", name)
    assert (facts.hidden, facts.expert_hidden) == (model["hidden_size"], model["expert_hidden"])
    assert (facts.experts, facts.top_k) == (model["experts"], model["top_k"])
    assert (facts.layers, facts.heads) == (model["layers"], model["heads"])
    assert facts.kv_heads == model["kv_heads"]
    assert class_size(facts, "routed") == model["expert_size"]
    assert class_size(facts, "shared") == expected_shared(family, model)
    assert class_size(facts, "dense") == (DENSE_SIZE if family.fields.dense else None)


def class_size(facts: ModelFacts, name: ClassName) -> int | None:
    found = facts.tensor_class(name)
    return found.size if found else None


def expected_shared(family: Family, model: Mapping[str, Any]) -> int | None:
    shared = family.fields.shared
    if shared is None:
        return None
    if shared.times:
        return model["shared_experts"] * model["expert_size"] or None
    return model["expert_size"] if shared.field == family.fields.routed.field else OWN_SHARED_SIZE


def test_dense_class_needs_its_condition() -> None:
    family = FAMILIES["qwen3_moe"]
    config = {**config_of("Qwen3-30B-A3B", family), "mlp_only_layers": []}
    assert class_size(read_facts(config, family, "test", "x"), "dense") is None


def all_fields(family: Family) -> list[tuple[str, ...]]:
    fields = family.fields
    sizes = [size for size in (fields.routed, fields.shared, fields.dense) if isinstance(size, Size)]
    named = [n for s in sizes for n in (s.field, s.times, s.only_if) if n]
    return [*named, fields.experts, fields.top_k, fields.hidden, fields.layers, fields.kv_heads]


def missing_fields(family: Family, config: Any) -> list[tuple[str, ...]]:
    text = config.get_text_config()
    return [n for n in all_fields(family) if not any(hasattr(part, x) for x in n for part in (config, text))]


TYPED = [(family.name, model_type) for family in FAMILIES.values() for model_type in family.match.model_types]


@pytest.mark.parametrize(("name", "model_type"), TYPED)
def test_transformers_config_has_the_fields(name: str, model_type: str) -> None:
    mapping = pytest.importorskip("transformers").CONFIG_MAPPING
    if model_type not in mapping:
        pytest.skip("not in this transformers")
    # MiniMax-M3's class has no such field, and keeps what config.json says.
    arguments = {"minimax_m3_vl": {"text_config": {"n_shared_experts": 1}}}.get(model_type, {})
    assert not missing_fields(FAMILIES[name], mapping[model_type](**arguments))


@pytest.mark.parametrize(("name", "model_type"), TYPED)
def test_vllm_config_has_the_fields(name: str, model_type: str) -> None:
    registry = pytest.importorskip("vllm.transformers_utils.config")._CONFIG_REGISTRY
    if model_type not in registry:
        pytest.skip("this vLLM has no config class of its own")
    given = {names[0]: 1 for names in all_fields(FAMILIES[name])}
    # DeepSeek-V4's and V4.1's classes have no defaults: they take over what config.json says, V4.1's from text_config.
    arguments = {"deepseek_v4": given, "deepseek_v41": {"text_config": given}}.get(model_type, {})
    assert not missing_fields(FAMILIES[name], registry[model_type](**arguments))


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_registers_the_architectures(name: str) -> None:
    registry = pytest.importorskip("vllm.model_executor.models.registry").ModelRegistry
    assert set(FAMILIES[name].match.architectures) <= set(registry.get_supported_archs())


L3 = "model.layers.3."
Row = tuple[ClassName, Role, str, bool] | None
NAMES: dict[str, dict[str, Row]] = {
    "deepseek_v2": {
        "model.layers.0.mlp.gate_proj.weight": ("dense", "gate", ".weight", False),
        L3 + "mlp.experts.159.up_proj.weight": ("routed", "up", ".weight", False),
        L3 + "mlp.shared_experts.down_proj.weight": ("shared", "down", ".weight", False),
        "language.model.layers.3.mlp.experts.0.gate_proj.weight": ("routed", "gate", ".weight", False),
        L3 + "mlp.gate.weight": None,
        L3 + "self_attn.kv_a_proj_with_mqa.weight": None,
        "model.embed_tokens.weight": None,
    },
    "deepseek_v3": {
        L3 + "mlp.experts.255.down_proj.weight_scale_inv": ("routed", "down", ".weight_scale_inv", False),
        "model.layers.61.mlp.experts.0.gate_proj.weight": ("routed", "gate", ".weight", False),
        "model.layers.61.mlp.shared_experts.up_proj.weight": ("shared", "up", ".weight", False),
        "language_model.model.layers.1.mlp.experts.5.up_proj.weight": ("routed", "up", ".weight", False),
        L3 + "mlp.gate.e_score_correction_bias": None,
        "model.layers.61.eh_proj.weight": None,
        "model.layers.61.shared_head.head.weight": None,
        "lm_head.weight": None,
    },
    "deepseek_v32": {
        L3 + "mlp.experts.7.gate_proj.weight_scale_inv": ("routed", "gate", ".weight_scale_inv", False),
        "model.layers.0.mlp.down_proj.weight_scale_inv": ("dense", "down", ".weight_scale_inv", False),
        L3 + "self_attn.indexer.wk.weight": None,
        L3 + "mlp.gate.weight": None,
    },
    "deepseek_v4": {
        "layers.3.ffn.experts.7.w1.weight": ("routed", "gate", ".weight", False),
        "layers.3.ffn.experts.7.w3.scale": ("routed", "up", ".scale", False),
        "layers.3.ffn.experts.7.w2.scale": ("routed", "down", ".scale", False),
        "layers.0.ffn.shared_experts.w1.scale": ("shared", "gate", ".scale", False),
        "mtp.0.ffn.experts.255.w2.weight": ("routed", "down", ".weight", False),
        "mtp.0.ffn.shared_experts.w3.weight": ("shared", "up", ".weight", False),
        "layers.3.ffn.gate.weight": None,
        "layers.3.ffn.gate.bias": None,
        "layers.0.ffn.gate.tid2eid": None,
        "layers.3.attn.wq_a.weight": None,
        "layers.3.attn.compressor.wgate.weight": None,
        "layers.3.hc_ffn_fn": None,
        "embed.weight": None,
        "head.weight": None,
    },
    "deepseek_v41": {
        "layers.39.ffn.experts.383.w2.weight": ("routed", "down", ".weight", False),
        "mtp.2.ffn.experts.127.w1.scale": ("routed", "gate", ".scale", False),
        "layers.3.ffn.shared_experts.w2.scale": ("shared", "down", ".scale", False),
        "mtp.0.markov_head.embed.weight": None,
        "vision.blocks.0.mlp.w1.weight": None,
        "layers.3.ffn.gate.weight": None,
    },
    "kimi_k2": {
        L3 + "mlp.experts.383.gate_proj.weight_packed": ("routed", "gate", ".weight_packed", False),
        L3 + "mlp.experts.383.down_proj.weight_shape": ("routed", "down", ".weight_shape", False),
        "model.layers.0.mlp.up_proj.weight": ("dense", "up", ".weight", False),
        L3 + "mlp.gate.e_score_correction_bias": None,
    },
    "kimi_k25": {
        "language_model.model.layers.3.mlp.experts.7.up_proj.weight_scale": ("routed", "up", ".weight_scale", False),
        "language_model.layers.3.mlp.experts.7.up_proj.weight_scale_2": ("routed", "up", ".weight_scale_2", False),
        "language_model.model.layers.0.mlp.down_proj.weight": ("dense", "down", ".weight", False),
        "language_model.model.layers.3.mlp.shared_experts.gate_proj.weight": ("shared", "gate", ".weight", False),
        "language_model.model.layers.3.mlp.gate.weight": None,
        "vision_tower.encoder.blocks.0.mlp.fc0.weight": None,
        "mm_projector.proj.0.weight": None,
    },
    "kimi_k3": {
        "language_model.model.layers.3.block_sparse_moe.experts.895.w1.weight_packed": (
            "routed",
            "gate",
            ".weight_packed",
            False,
        ),
        "language_model.model.layers.3.block_sparse_moe.experts.0.w2.weight_scale": (
            "routed",
            "down",
            ".weight_scale",
            False,
        ),
        "language_model.model.layers.3.block_sparse_moe.shared_experts.up_proj.weight": (
            "shared",
            "up",
            ".weight",
            False,
        ),
        "language_model.model.layers.0.mlp.gate_proj.weight": ("dense", "gate", ".weight", False),
        "language_model.model.layers.3.block_sparse_moe.routed_expert_down_proj.weight": None,
        "language_model.model.layers.3.block_sparse_moe.routed_expert_up_proj.weight": None,
        "language_model.model.layers.3.block_sparse_moe.gate.weight": None,
        "language_model.model.layers.3.block_sparse_moe.gate.e_score_correction_bias": None,
    },
    "kimi_linear": {
        L3 + "block_sparse_moe.experts.7.w3.weight": ("routed", "up", ".weight", False),
        L3 + "block_sparse_moe.shared_experts.down_proj.weight": ("shared", "down", ".weight", False),
        "model.layers.0.mlp.gate_proj.weight": ("dense", "gate", ".weight", False),
        L3 + "block_sparse_moe.gate.weight": None,
        L3 + "self_attn.g_proj.weight": None,
    },
    "glm4_moe": {
        L3 + "mlp.experts.7.down_proj.weight_scale": ("routed", "down", ".weight_scale", False),
        "model.layers.92.mlp.experts.7.gate_proj.weight": ("routed", "gate", ".weight", False),
        "model.language_model.layers.0.mlp.gate_proj.weight": ("dense", "gate", ".weight", False),
        L3 + "mlp.gate.e_score_correction_bias": None,
        "model.visual.blocks.0.mlp.gate_proj.weight": None,
    },
    "glm4_moe_lite": {
        "model.layers.47.mlp.experts.63.up_proj.weight": ("routed", "up", ".weight", False),
        L3 + "mlp.shared_experts.gate_proj.weight": ("shared", "gate", ".weight", False),
        L3 + "mlp.gate.weight": None,
    },
    "glm_moe_dsa": {
        "model.layers.78.mlp.experts.0.down_proj.weight": ("routed", "down", ".weight", False),
        L3 + "mlp.experts.7.gate_proj.weight_scale_2": ("routed", "gate", ".weight_scale_2", False),
        L3 + "self_attn.indexer.wq_b.weight": None,
    },
    "qwen3_moe": {
        L3 + "mlp.experts.7.gate_proj.weight_scale_inv": ("routed", "gate", ".weight_scale_inv", False),
        "model.language_model.layers.3.mlp.experts.gate_up_proj": ("routed", "gate_up", "", True),
        "model.language_model.layers.3.mlp.experts.down_proj": ("routed", "down", "", True),
        L3 + "mlp.gate.weight": None,
        L3 + "self_attn.q_proj.weight": None,
        "model.visual.blocks.0.mlp.linear_fc1.weight": None,
    },
    "qwen3_next": {
        L3 + "mlp.shared_expert.down_proj.weight_scale_inv": ("shared", "down", ".weight_scale_inv", False),
        "mtp.layers.0.mlp.experts.511.up_proj.weight": ("routed", "up", ".weight", False),
        "mtp.layers.0.mlp.shared_expert.gate_proj.weight": ("shared", "gate", ".weight", False),
        L3 + "mlp.shared_expert_gate.weight": None,
        L3 + "linear_attn.in_proj_qkvz.weight": None,
        "mtp.fc.weight": None,
    },
    "qwen3_5_moe": {
        "model.language_model.layers.3.mlp.experts.gate_up_proj": ("routed", "gate_up", "", True),
        "model.language_model.layers.3.mlp.experts.7.down_proj.weight_scale_inv": (
            "routed",
            "down",
            ".weight_scale_inv",
            False,
        ),
        "mtp.layers.0.mlp.experts.down_proj": ("routed", "down", "", True),
        L3 + "mlp.shared_expert.up_proj.weight": ("shared", "up", ".weight", False),
        L3 + "mlp.shared_expert_gate.weight": None,
        L3 + "mlp.gate.weight": None,
        "mtp.fc.weight": None,
    },
    "minimax_m2": {
        L3 + "block_sparse_moe.experts.255.w1.weight_scale_inv": ("routed", "gate", ".weight_scale_inv", False),
        L3 + "block_sparse_moe.experts.255.w2.weight": ("routed", "down", ".weight", False),
        L3 + "block_sparse_moe.e_score_correction_bias": None,
        L3 + "block_sparse_moe.gate.weight": None,
    },
    "minimax_m3": {
        "language_model." + L3 + "block_sparse_moe.experts.127.w1.weight_packed": (
            "routed",
            "gate",
            ".weight_packed",
            False,
        ),
        L3 + "block_sparse_moe.experts.0.w2.weight_scale_inv": ("routed", "down", ".weight_scale_inv", False),
        L3 + "block_sparse_moe.shared_experts.up_proj.weight": ("shared", "up", ".weight", False),
        "language_model.model.layers.0.mlp.down_proj.weight": ("dense", "down", ".weight", False),
        "language_model.model.mtp.layers.0.transformer_layer.block_sparse_moe.experts.7.w3.weight": (
            "routed",
            "up",
            ".weight",
            False,
        ),
        L3 + "block_sparse_moe.e_score_correction_bias": None,
        L3 + "block_sparse_moe.gate.weight": None,
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": None,
    },
    "step3p5": {
        L3 + "moe.gate_proj.weight": ("routed", "gate", ".weight", True),
        L3 + "moe.down_proj.weight_scale_inv": ("routed", "down", ".weight_scale_inv", True),
        L3 + "moe.experts.7.up_proj.weight_packed": ("routed", "up", ".weight_packed", False),
        L3 + "share_expert.down_proj.weight": ("shared", "down", ".weight", False),
        "model.layers.45.mlp.gate_proj.weight": ("dense", "gate", ".weight", False),
        "model.language_model.layers.0.mlp.up_proj.weight": ("dense", "up", ".weight", False),
        L3 + "moe.gate.weight": None,
        L3 + "moe.router_bias": None,
        L3 + "self_attn.g_proj.weight": None,
    },
    "gpt_oss": {
        L3 + "mlp.experts.gate_up_proj_blocks": ("routed", "gate_up", "_blocks", True),
        L3 + "mlp.experts.gate_up_proj_scales": ("routed", "gate_up", "_scales", True),
        L3 + "mlp.experts.gate_up_proj_bias": ("routed", "gate_up", "_bias", True),
        L3 + "mlp.experts.down_proj_blocks": ("routed", "down", "_blocks", True),
        L3 + "mlp.experts.down_proj": ("routed", "down", "", True),
        L3 + "mlp.router.weight": None,
        L3 + "mlp.router.bias": None,
        L3 + "self_attn.sinks": None,
    },
    "longcat_flash": {
        L3 + "mlp.experts.511.gate_proj.weight": ("routed", "gate", ".weight", False),
        L3 + "mlps.1.down_proj.weight": ("dense", "down", ".weight", False),
        "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight": ("dense", "up", ".weight", False),
        L3 + "mlp.router.classifier.weight": None,
        L3 + "mlp.router.e_score_correction_bias": None,
        L3 + "self_attn.1.o_proj.weight": None,
    },
    "ernie4_5_moe": {
        L3 + "mlp.experts.63.up_proj.weight": ("routed", "up", ".weight", False),
        L3 + "mlp.shared_experts.gate_proj.weight": ("shared", "gate", ".weight", False),
        "model.mtp_block.0.mlp.down_proj.weight": ("dense", "down", ".weight", False),
        L3 + "mlp.gate.weight": None,
        L3 + "mlp.moe_statics.e_score_correction_bias": None,
    },
    "llama4": {
        "language_model.model.layers.1.feed_forward.experts.gate_up_proj": ("routed", "gate_up", "", True),
        "language_model.model.layers.1.feed_forward.experts.down_proj": ("routed", "down", "", True),
        "language_model.model.layers.1.feed_forward.experts.0.gate_proj.weight_scale": (
            "routed",
            "gate",
            ".weight_scale",
            False,
        ),
        "language_model.model.layers.1.feed_forward.shared_expert.up_proj.weight": ("shared", "up", ".weight", False),
        "language_model.model.layers.0.feed_forward.down_proj.weight": ("dense", "down", ".weight", False),
        "language_model.model.layers.1.feed_forward.router.weight": None,
        "vision_model.model.layers.0.mlp.fc1.weight": None,
    },
    "mimo_v2": {
        L3 + "mlp.experts.255.up_proj.weight_scale_inv": ("routed", "up", ".weight_scale_inv", False),
        "model.mtp.layers.0.mlp.gate_proj.weight": ("dense", "gate", ".weight", False),
        "model.layers.0.mlp.down_proj.weight": ("dense", "down", ".weight", False),
        L3 + "mlp.gate.e_score_correction_bias": None,
        "model.mtp.layers.0.eh_proj.weight": None,
    },
}


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, rows in NAMES.items() for n in rows])
def test_published_tensor_names_classify(family: str, name: str) -> None:
    matrix = FAMILIES[family].classify(name)
    found = matrix and (matrix.class_name, matrix.role, matrix.suffix, matrix.is_fused)
    assert found == NAMES[family][name]


def test_the_table_has_every_family() -> None:
    assert set(NAMES) == set(FAMILIES)


def write_patch(folder: Path, **changes: str) -> Path:
    """DeepSeek-V3's patch with some of its lines replaced, under another name or the same."""
    text = (PATCHES / "deepseek_v3.toml").read_text(encoding="utf-8")
    for old, new in changes.items():
        text = "\n".join(new if line.startswith(f"{old} =") else line for line in text.splitlines())
    name = next(line for line in text.splitlines() if line.startswith("name =")).split('"')[1]
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_patch_that_is_not_named_like_its_file_is_refused(tmp_path: Path) -> None:
    path = write_patch(tmp_path).rename(tmp_path / "other.toml")
    with pytest.raises(PatchError, match="a patch is named like its file: 'other'"):
        load_families(folders=[path.parent])


def test_a_users_patch_comes_before_the_built_in_ones(tmp_path: Path) -> None:
    write_patch(tmp_path, name='name = "my_deepseek"')
    found = find_family({"model_type": "deepseek_v3"}, load_families(folders=[tmp_path]))
    assert found is not None
    assert found[0].name == "my_deepseek"


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = write_patch(tmp_path, experts='experts = "n_routed_experts"\nexpertz = "x"')
    with pytest.raises(PatchError, match=rf"{path.name}[\s\S]*fields\.expertz"):
        load_family(path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = write_patch(tmp_path, top_k="")
    with pytest.raises(PatchError, match=rf"{path.name}[\s\S]*fields\.top_k"):
        load_family(path)


def test_a_field_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"fields\.experts"):
        load_family(write_patch(tmp_path, experts="experts = []"))


def test_what_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("name = ", encoding="utf-8")
    with pytest.raises(PatchError, match=r"mine\.toml: not a TOML file"):
        load_family(path)


def test_selection() -> None:
    assert set(load_families("all")) == set(FAMILIES)
    assert load_families("none") == {}
    assert list(load_families("gpt_oss, glm4_moe")) == ["glm4_moe", "gpt_oss"]
    assert set(load_families("-gpt_oss,-llama4")) == set(FAMILIES) - {"gpt_oss", "llama4"}
    with pytest.raises(PatchError, match="EP2TP_PATCHES names nonsense"):
        load_families("nonsense,gpt_oss")


def test_a_users_patch_replaces_the_built_in_one(tmp_path: Path) -> None:
    write_patch(tmp_path, title='title = "mine"')
    (tmp_path / "later").mkdir()
    write_patch(tmp_path / "later", title='title = "not mine"')
    families = load_families(folders=[tmp_path, tmp_path / "later"])
    assert families["deepseek_v3"].title == "mine"
    assert len(families) == len(FAMILIES)


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MLP = {"intermediate_size": 96, "moe_intermediate_size": 48}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
ROUTED = {"num_experts_per_tok": 2}
DEEPSEEK = {**MLP, **ROUTED, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1}
GROUPS = {"n_group": 1, "topk_group": 1}
GDN = {f"linear_{x}": 2 if "num" in x else 16 for x in ("num_key_heads", "num_value_heads", "key_head_dim")}
QWEN = {**MLP, **ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 32, **GDN, "linear_value_head_dim": 16}
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**MLA, **DEEPSEEK},
    "deepseek_v3": {**MLA, **DEEPSEEK, **GROUPS},
    "deepseek_v4": {**ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 48},
    "glm4_moe": {**DEEPSEEK, **GROUPS},
    "glm4_moe_lite": {**MLA, **DEEPSEEK, **GROUPS},
    "qwen3_moe": {**MLP, **ROUTED, "num_experts": 4, "mlp_only_layers": [0]},
    "qwen3_next": {**QWEN, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": QWEN,
    "minimax_m2": {**ROUTED, "intermediate_size": 48, "num_local_experts": 4},
    "gpt_oss": {**ROUTED, "intermediate_size": 48, "num_local_experts": 4},
    "longcat_flash": {
        **MLA,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "n_routed_experts": 4,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "ernie4_5_moe": {
        **MLP,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "llama4_text": {
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "kimi_linear": {
        **MLA,
        **MLP,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "mimo_v2_flash": {**MLP, **ROUTED, "n_routed_experts": 4},
    "step3p7": {**MLP, **ROUTED, "n_routed_experts": 4, "share_expert_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
}
NOT_MLP = ("gate.weight", "router.weight", "classifier.weight", "expert_gate.weight", "router.bias", "_bias", "tid2eid")
MODULES = (".mlp.", ".mlps.", ".moe.", ".ffn.", ".feed_forward.", ".block_sparse_moe.", ".share_expert.")


def save_tiny(model_type: str, folder: Path) -> None:
    """Write a tiny random checkpoint, as transformers names it."""
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    config_class = transformers.CONFIG_MAPPING[model_type]
    sizes = {**SMALL, **TINY[model_type]}
    if model_type == "longcat_flash":
        del sizes["num_hidden_layers"]  # transformers derives it
    if model_type == "kimi_linear":
        del sizes["q_lora_rank"]  # it has none
    auto = transformers.AutoModelForCausalLM
    if "text_config" in config_class.sub_configs:
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "depth": 1, "intermediate_size": 32, "out_hidden_size": 64}
        config = config_class(text_config=sizes, vision_config={**vision, "deepstack_visual_indexes": []})
        auto = transformers.AutoModelForImageTextToText
    else:
        config = config_class(**sizes)
    auto.from_config(config).save_pretrained(folder)


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    safe_open = pytest.importorskip("safetensors").safe_open
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def is_mlp_weight(name: str) -> bool:
    # a vision tower's and attention's own names hold none of MODULES, or one of those after "visual" or "vision_model"
    in_text = not any(part in name for part in ("visual.", "vision_model.", ".attn."))
    return in_text and any(part in name for part in MODULES) and not name.endswith(NOT_MLP)


@pytest.mark.parametrize("model_type", TINY)
def test_what_transformers_saves_is_classified_and_divides(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    found = find_family(config, FAMILIES)
    assert found is not None
    plan = plan_shards(read_facts(config, *found, model_type), ranks=2)
    tensors = saved_tensors(tmp_path)
    weights = {name for name in tensors if is_mlp_weight(name)}
    assert weights
    planned = {name for name, (shape, dtype) in tensors.items() if plan.tensor(name, shape, dtype)}
    fused_biases = {name for name in planned - weights if name.endswith("proj_bias")}
    assert planned == weights | fused_biases
    assert {FAMILIES[found[0].name].classify(n).class_name for n in planned} == {c.name for c in plan.facts.classes}


def test_transposed_experts_are_cut_on_the_other_axis() -> None:
    # Qwen3-VL-MoE's published layout: [expert, hidden, 2 x size] and [expert, size, hidden]. vLLM 0.28 and later always
    # turns it, so what transformers 5 writes (the other way round) is refused.
    config = {**config_of("Qwen3-30B-A3B", FAMILIES["qwen3_moe"]), "model_type": "qwen3_vl_moe"}
    plan = plan_shards(read_facts(config, FAMILIES["qwen3_moe"], "test", "x"), ranks=2)
    names = "model.language_model.layers.0.mlp.experts."
    gate_up = plan.tensor(names + "gate_up_proj", (128, 2048, 1536), "BF16")
    down = plan.tensor(names + "down_proj", (128, 768, 2048), "BF16")
    assert gate_up is not None and gate_up.cut is not None and (gate_up.cut.axis, gate_up.cut.parts) == (2, 2)
    assert down is not None and down.cut is not None and (down.cut.axis, down.cut.parts) == (1, 1)
    with pytest.raises(CheckpointError, match="does not match its config"):
        plan.tensor(names + "down_proj", (128, 2048, 768), "BF16")


def test_gpt_oss_packed_experts_are_not_transposed() -> None:
    config = {**config_of("gpt-oss-120b", FAMILIES["gpt_oss"]), "quantization_config": {"quant_method": "mxfp4"}}
    plan = plan_shards(read_facts(config, FAMILIES["gpt_oss"], "test", "x"), ranks=2)
    names = "model.layers.0.mlp.experts."
    for suffix, shape in (("_blocks", (128, 5760, 90, 16)), ("_scales", (128, 5760, 90)), ("_bias", (128, 5760))):
        dtype = "BF16" if suffix == "_bias" else "U8"
        place = plan.tensor(names + "gate_up_proj" + suffix, shape, dtype)
        assert place is not None and place.cut is not None and place.cut.axis == 1
    place = plan.tensor(names + "down_proj_scales", (128, 2880, 90), "U8")
    assert place is not None and place.cut is not None and place.cut.axis == 2
