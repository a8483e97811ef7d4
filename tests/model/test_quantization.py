"""Which format ``quantization_config`` gives each module, for every method that ep2tp reads."""

from __future__ import annotations

from typing import Any

import pytest

from ep2tp.errors import ModelError
from ep2tp.model.formats import Format
from ep2tp.model.quantization import read_quantization

EXPERT = "model.layers.3.mlp.experts.7.gate_proj"
SHARED = "model.layers.3.mlp.shared_experts.down_proj"
DENSE = "model.layers.0.mlp.up_proj"
ATTENTION = "model.layers.3.self_attn.o_proj"


def names(quant: dict[str, Any], *modules: str, **config: Any) -> list[str | None]:
    """The formats' names of modules; None where ep2tp knows none."""
    found: list[Format | None] = [
        read_quantization({**config, "quantization_config": quant}).choose(module) for module in modules
    ]
    return [stored.name if stored else None for stored in found]


def compressed(weights: dict[str, Any] | None, form: str = "", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **more}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def test_no_quantization() -> None:
    quantization = read_quantization({"hidden_size": 8})
    assert quantization.method == "none"
    assert quantization.choose(EXPERT).name == "bf16"  # type: ignore[union-attr]


def test_compression_config_is_read_too() -> None:
    quantization = read_quantization({"compression_config": compressed(INT4, "pack-quantized")})
    assert quantization.method == "compressed-tensors"
    assert quantization.choose(EXPERT).name == "int4_g32"  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["bitsandbytes", "quark", "", None])
def test_an_unknown_method_gives_no_format(method: str | None) -> None:
    quantization = read_quantization(
        {"quantization_config": {"quant_method": method} if method is not None else {"a": 1}}
    )
    assert quantization.choose(EXPERT) is None
    assert quantization.method == (method or "unknown")


# quant_method fp8


def test_fp8_blocks() -> None:
    quant = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert names(quant, EXPERT, SHARED, DENSE, model_type="deepseek_v3") == ["fp8_block128"] * 3


def test_fp8_blocks_of_other_sizes() -> None:
    assert names({"quant_method": "fp8", "weight_block_size": [64, 64]}, EXPERT) == ["fp8_block64"]
    assert names({"quant_method": "fp8", "weight_block_size": [1, 128]}, EXPERT) == ["fp8_block1x128"]


def test_fp8_without_blocks_has_one_scale_per_tensor() -> None:
    assert names({"quant_method": "fp8"}, EXPERT) == ["fp8_tensor"]


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_fp8_skips_listed_modules(key: str) -> None:
    skipped = ["lm_head", "model.layers.3.mlp.gate", "model.layers.0.mlp", "shared_experts"]
    quant = {"quant_method": "fp8", "weight_block_size": [128, 128], key: skipped}
    assert names(quant, EXPERT, SHARED, DENSE) == ["fp8_block128", "bf16", "bf16"]


def test_fp8_skip_names_do_not_match_parts_of_a_name() -> None:
    """``mlp.gate`` is the router, not ``mlp.gate_proj``; layer 1 is not layer 10."""
    quant = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.gate", "model.layers.1"]}
    assert names(quant, "model.layers.0.mlp.gate_proj", "model.layers.10.mlp.up_proj") == ["fp8_tensor"] * 2


@pytest.mark.parametrize("block", [128, [128], [128, 128, 128], [0, 128], [128.0, 128], "128", [128, None]], ids=str)
def test_a_bad_block_size_is_refused(block: Any) -> None:
    with pytest.raises(ModelError, match="block size"):
        names({"quant_method": "fp8", "weight_block_size": block}, EXPERT)


# DeepSeek-V4

V4 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
V4_MODULES = ("layers.3.ffn.experts.7.w1", "layers.3.ffn.shared_experts.w2", "mtp.0.ffn.experts.7.w2")


@pytest.mark.parametrize("method", ["fp8", "deepseek_v4_fp8"])
@pytest.mark.parametrize("model_type", ["deepseek_v4", "deepseek_v41"])
def test_deepseek_v4_experts_are_mxfp4_by_default(method: str, model_type: str) -> None:
    quant = {**V4, "quant_method": method}
    assert names(quant, *V4_MODULES, model_type=model_type) == ["mxfp4", "fp8_block128", "mxfp4"]


def test_deepseek_v4_base_experts_are_fp8() -> None:
    assert names(V4, *V4_MODULES, model_type="deepseek_v4", expert_dtype="fp8") == ["fp8_block128"] * 3


def test_expert_dtype_of_another_model_counts_too() -> None:
    assert names(V4, *V4_MODULES, model_type="x", expert_dtype="fp4") == ["mxfp4", "fp8_block128", "mxfp4"]
    assert names({**V4, "expert_dtype": "fp4"}, *V4_MODULES, model_type="x") == ["mxfp4", "fp8_block128", "mxfp4"]


def test_deepseek_v4_skips_listed_modules() -> None:
    quant = {**V4, "modules_to_not_convert": ["mtp.0"]}
    assert names(quant, *V4_MODULES, model_type="deepseek_v4") == ["mxfp4", "fp8_block128", "bf16"]


# compressed-tensors


@pytest.mark.parametrize(
    ("weights", "form", "expected"),
    [
        (INT4, "pack-quantized", "int4_g32"),
        ({**INT4, "group_size": 128}, "pack-quantized", "int4_g128"),
        ({**INT4, "num_bits": 8, "group_size": 64}, "pack-quantized", "int8_g64"),
        (FP8_CHANNEL, "float-quantized", "fp8_channel"),
        ({**FP8_CHANNEL, "strategy": "tensor"}, "float-quantized", "fp8_tensor"),
        ({**FP8_CHANNEL, "strategy": "block", "block_structure": [128, 128]}, "float-quantized", "fp8_block128"),
        ({**FP8_CHANNEL, "strategy": "group", "group_size": 32}, "mxfp8-quantized", "mxfp8"),
        (NVFP4, "nvfp4-pack-quantized", "nvfp4"),
        ({**NVFP4, "strategy": "group", "group_size": 32}, "mxfp4-pack-quantized", "mxfp4"),
        (None, "dense", "bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compressed_tensors(weights: dict[str, Any] | None, form: str, expected: str) -> None:
    assert names(compressed(weights, form), EXPERT, SHARED, DENSE) == [expected] * 3


@pytest.mark.parametrize(
    ("weights", "form"),
    [
        ({**INT4, "symmetric": False}, "pack-quantized"),
        ({**INT4, "num_bits": 3}, "pack-quantized"),
        (INT4, "int-quantized"),
        ({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"),
        ({**FP8_CHANNEL, "strategy": "attn_head"}, "float-quantized"),
    ],
    ids=["asymmetric", "3 bits", "unpacked int4", "int8", "attn_head"],
)
def test_compressed_tensors_that_ep2tp_does_not_know(weights: dict[str, Any], form: str) -> None:
    assert names(compressed(weights, form), EXPERT) == [None]


def assert_unsliceable(quant: dict[str, Any], reason: str) -> None:
    """No format, and a reason for the message of whoever has to slice it; reading the config alone is no error."""
    quantization = read_quantization({"quantization_config": quant})
    assert quantization.choose(EXPERT) is None
    assert reason in quantization.method


@pytest.mark.parametrize("changed", [{"strategy": "channel"}, {"group_size": None}, {"group_size": 0}], ids=str)
def test_packed_integers_without_groups_cannot_be_sliced(changed: dict[str, Any]) -> None:
    assert_unsliceable(compressed({**INT4, **changed}, "pack-quantized"), "config_groups.group_0: packed integers")


@pytest.mark.parametrize("structure", [None, [128], [128, 0]], ids=str)
def test_a_bad_block_structure_is_refused(structure: Any) -> None:
    with pytest.raises(ModelError, match="block size"):
        names(compressed({**FP8_CHANNEL, "strategy": "block", "block_structure": structure}), EXPERT)


@pytest.mark.parametrize(
    ("ignored", "expected"),
    [
        (["lm_head"], ["int4_g32", "int4_g32", "int4_g32"]),
        ([SHARED], ["int4_g32", "bf16", "int4_g32"]),
        (["re:.*shared_experts.*"], ["int4_g32", "bf16", "int4_g32"]),
        (["re:.*self_attn.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"], ["int4_g32", "int4_g32", "bf16"]),
        (["re:shared_experts"], ["int4_g32", "int4_g32", "int4_g32"]),
        (["model.layers.3.mlp"], ["int4_g32", "int4_g32", "int4_g32"]),
    ],
    ids=str,
)
def test_compressed_tensors_ignores_exact_names_and_expressions_from_the_start(
    ignored: list[str], expected: list[str]
) -> None:
    assert names(compressed(INT4, "pack-quantized", ignore=ignored), EXPERT, SHARED, DENSE) == expected


@pytest.mark.parametrize("order", [1, -1], ids=["class first", "name first"])
def test_a_target_that_names_the_module_beats_its_class(order: int) -> None:
    groups = [
        ("group_0", {"targets": ["Linear"], "weights": FP8_CHANNEL}),
        ("group_1", {"targets": [r"re:.*\.experts\..*"], "weights": INT4, "format": "pack-quantized"}),
    ]
    quant = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": dict(groups[::order])}
    assert names(quant, EXPERT, SHARED) == ["int4_g32", "fp8_channel"]


def test_modules_that_no_group_targets_are_unquantised() -> None:
    groups = {"group_0": {"targets": [r"re:.*experts\.\d+\..*", DENSE], "weights": INT4, "format": "pack-quantized"}}
    quant = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    assert names(quant, EXPERT, SHARED, DENSE) == ["int4_g32", "bf16", "int4_g32"]


# ModelOpt


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("NVFP4", "nvfp4"),
        ("W4A16_NVFP4", "nvfp4"),
        ("FP8", "fp8_tensor"),
        ("FP8_PB_WO", "fp8_block128"),
        ("fp8_pb_wo", "fp8_block128"),
        ("MXFP8", "mxfp8"),
        ("MIXED_PRECISION", None),
        ("", None),
    ],
)
def test_modelopt(algorithm: str, expected: str | None) -> None:
    assert names({"quant_method": "modelopt", "quant_algo": algorithm}, EXPERT) == [expected]
    assert names({"quant_method": "modelopt_fp4", "quant_algo": algorithm}, EXPERT) == [expected]


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        (["lm_head"], ["nvfp4", "nvfp4", "nvfp4"]),
        (["model.layers.3.mlp.shared_experts*"], ["nvfp4", "bf16", "nvfp4"]),
        (["*shared_experts*", "*.self_attn.*"], ["nvfp4", "bf16", "nvfp4"]),
        (["model.layers.3*"], ["bf16", "bf16", "nvfp4"]),
        (["model.layers.0.mlp"], ["nvfp4", "nvfp4", "bf16"]),
        (["*.mlp.gate"], ["nvfp4", "nvfp4", "nvfp4"]),
        (["shared_experts", "gate"], ["nvfp4", "bf16", "nvfp4"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True], ids=["config.json", "hf_quant_config.json"])
def test_modelopt_excludes_by_wildcard(excluded: list[str], expected: list[str], nested: bool) -> None:
    quant: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": excluded}
    if nested:
        quant = {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "exclude_modules": excluded}}
    assert names(quant, EXPERT, SHARED, DENSE) == expected


# gpt-oss


def test_mxfp8_of_minimax_m3() -> None:
    """M3.1 keeps its routed experts in NVFP4 under the same method."""
    skipped = ["language_model.model.layers.0", "block_sparse_moe.gate"]
    quant = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": skipped}
    layer = "language_model.model.layers.3.block_sparse_moe."
    modules = (layer + "experts.7.w1", layer + "shared_experts.up_proj", layer + "gate", skipped[0] + ".mlp.up_proj")
    assert names(quant, *modules) == ["mxfp8", "mxfp8", "bf16", "bf16"]
    nvfp4 = {**quant, "moe_quant_algo": "NVFP4", "moe_quant_format": "nvfp4-pack-quantized"}
    assert names(nvfp4, *modules) == ["nvfp4", "mxfp8", "bf16", "bf16"]


def test_mxfp4_quantises_experts_alone() -> None:
    quant = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    modules = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.router", ATTENTION)
    assert names(quant, *modules) == ["mxfp4", "bf16", "bf16"]


# AWQ and GPTQ


def test_awq() -> None:
    quant = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["shared_experts", "gate"]}
    assert names(quant, EXPERT, SHARED) == ["awq_int4_g128", "bf16"]


def test_awq_by_its_older_names() -> None:
    assert names({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, EXPERT) == ["awq_int4_g64"]


@pytest.mark.parametrize("version", [None, "gptq", "gptq_v2"])
def test_gptq_zero_points_depend_on_the_version(version: str | None) -> None:
    quant = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": version}
    stored = read_quantization({"quantization_config": quant}).choose(EXPERT)
    assert stored is not None and stored.name == "gptq_int4_g128"
    zeros = stored.component(".qzeros")
    assert zeros is not None and zeros.fill == ("int4-zero" if version == "gptq_v2" else "int4-point")


def test_gptq_skips_listed_modules() -> None:
    quant = {"quant_method": "gptq", "bits": 8, "group_size": 32, "modules_to_not_convert": ["shared_experts"]}
    assert names(quant, EXPERT, SHARED) == ["gptq_int8_g32", "bf16"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("bits", [2, 3])
def test_values_that_do_not_fill_bytes_are_unknown(method: str, bits: int) -> None:
    assert names({"quant_method": method, "bits": bits, "group_size": 128}, EXPERT) == [None]


def test_gptq_activation_order_cannot_be_sliced() -> None:
    assert_unsliceable({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "desc_act=true")


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [({"group_size": -1}, "group_size=-1"), ({"bits": None}, "bits=None"), ({"bits": "4"}, "bits='4'")],
    ids=str,
)
def test_groups_that_are_no_numbers_cannot_be_sliced(method: str, changed: dict[str, Any], message: str) -> None:
    assert_unsliceable({"quant_method": method, "bits": 4, "group_size": 128, **changed}, message)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ([1], r"quantization_config=\[1\]; expected an object"),
        ("fp8", "expected an object"),
        ({"quant_method": "fp8", "modules_to_not_convert": 5}, "modules_to_not_convert=5; expected a list of names"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": [5]},
            "expected a list of names",
        ),
        ({"quant_method": "fp8", "weight_block_size": [1 << 60, 128]}, "block size"),
        ({"quant_method": "modelopt", "quantization": [1]}, "quantization=.*expected an object"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "config_groups=.*expected an object"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": 1}}, r"config_groups\.g=1; expected an object"),
        (compressed([4]), r"config_groups\.group_0\.weights=.*expected an object"),
        (compressed(INT4, ignore="lm_head"), "ignore='lm_head'; expected a list of names"),
    ],
)
def test_types_that_no_quantization_config_has(quant: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_quantization({"quantization_config": quant})


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern", ["(", "(.*)*(.*)*X$", "((a*))*X", "(a|a)+X", "(a{1,9}){1,9}X", "x" * 5000], ids=lambda text: text[:12]
)
def test_patterns_that_might_never_end(pattern: str) -> None:
    with pytest.raises(ModelError, match="has the pattern"):
        read_quantization({"quantization_config": compressed(INT4, ignore=["re:" + pattern])})


def test_patterns_as_published_checkpoints_have_them() -> None:
    patterns = [
        r"re:.*self_attn.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        r"re:(model\.)?layers\.(0|1)\..*\(x\)*",
    ]
    quantization = read_quantization({"quantization_config": compressed(INT4, "pack-quantized", ignore=patterns)})
    assert [quantization.choose(m).name for m in (EXPERT, DENSE, ATTENTION)] == ["int4_g32", "bf16", "bf16"]  # type: ignore[union-attr]
