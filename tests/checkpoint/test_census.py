"""Experts that are missing are found before anything is written, also where the totals of a checkpoint agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ep2tp.checkpoint.reshard import reshard
from ep2tp.errors import CheckpointError
from tests.checkpoint.checkpoints import Model, Stored, save, values
from tests.checkpoint.test_fused import COMMON, RNG, gpt_oss, qwen3_5, write

MODEL = Model("bf16", experts=3)
EXPERTS = "model.layers.1.mlp.experts"


def refused(tmp_path: Path, tensors: Stored, config: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "source", config, tensors)
    with pytest.raises(CheckpointError, match=message):
        reshard(source, tmp_path / "out", tp=7)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ([f"{EXPERTS}.1."], r"layers\.1 lacks 1 of its 3 experts, such as expert 1"),
        ([f"{EXPERTS}.2."], r"layers\.1 lacks 1 of its 3 experts, such as expert 2"),
        ([f"{EXPERTS}."], r"layers\.1 lacks 3 of its 3 experts"),
        (["model.layers.2.mlp.experts.0."], r"layers\.2 lacks 1 of its 3 experts, such as expert 0"),
        ([f"{EXPERTS}.0.gate", f"{EXPERTS}.1.up", f"{EXPERTS}.2.down"], r"experts\.\d .* has only .* some are missing"),
    ],
    ids=["one in the middle", "the last", "a layer's", "one of the MTP layer", "a projection of each expert"],
)
def test_missing_experts(tmp_path: Path, missing: list[str], message: str) -> None:
    tensors = {name: t for name, t in MODEL.tensors().items() if not name.startswith(tuple(missing))}
    refused(tmp_path, tensors, MODEL.config(), message)


def test_more_experts_than_the_config_says(tmp_path: Path) -> None:
    refused(tmp_path, MODEL.tensors(), MODEL.config() | {"n_routed_experts": 2}, "has 3 experts; config.json says 2")


@pytest.mark.parametrize("number", ["999999999", "9" * 5000])
def test_numbers_of_experts_that_no_model_has(tmp_path: Path, number: str) -> None:
    renamed = {name.replace("2.mlp.experts.1.", f"2.mlp.experts.{number}."): t for name, t in MODEL.tensors().items()}
    refused(tmp_path, renamed, MODEL.config(), "lacks .* of its")


def test_fused_experts_are_as_many_as_the_config_says(tmp_path: Path) -> None:
    config, tensors = qwen3_5()
    fewer = {name: t[:2].contiguous() for name, t in tensors.items()}
    refused(tmp_path, fewer, config, "lacks 1 of its 3 experts, such as expert 2")


def test_fused_tensors_of_a_layer_are_for_the_same_experts(tmp_path: Path) -> None:
    config, tensors = gpt_oss()
    name = "model.layers.0.mlp.experts.down_proj_scales"
    refused(tmp_path, tensors | {name: tensors[name][:2].contiguous()}, config, "experts; other tensors of")


def test_fused_experts_in_a_way_that_is_not_known(tmp_path: Path) -> None:
    """They are counted too, and left as they are where nothing needs padding."""
    config, _ = qwen3_5()
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    prefix = "model.layers.0.mlp.experts."
    tensors = {
        prefix + "gate_up_proj": values(RNG, "U8", 3, 2 * 96, 32),
        prefix + "down_proj": values(RNG, "U8", 3, 64, 48),
    }
    assert reshard(write(tmp_path / "source", config, tensors), tmp_path / "out", tp=1).status == "unneeded"
    fewer = {name: t[:2].contiguous() for name, t in tensors.items()}
    with pytest.raises(CheckpointError, match="lacks 1 of its 3 experts"):
        reshard(write(tmp_path / "fewer", config, fewer), tmp_path / "out", tp=1)


def test_a_draft_with_fewer_experts(tmp_path: Path) -> None:
    """DeepSeek-V4.1: the draft layers hold a number of experts of their own, which config.json does not say."""
    hidden, size = 64, 96
    tensors: Stored = {}
    for layer, experts in (("layers.0", 3), ("mtp.0", 2)):
        for expert in range(experts):
            for name, rows, cols in (("w1", size, hidden), ("w3", size, hidden), ("w2", hidden, size)):
                module = f"{layer}.ffn.experts.{expert}.{name}"
                tensors[module + ".weight"] = values(RNG, "I8", rows, cols // 2)
                tensors[module + ".scale"] = values(RNG, "F8_E8M0", rows, cols // 32)
    config = {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "n_routed_experts": 3,
        "moe_intermediate_size": size,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    }
    assert reshard(write(tmp_path / "source", config, tensors), tmp_path / "out", tp=2).status == "done"
    del tensors["mtp.0.ffn.experts.0.w1.weight"]
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "model.safetensors", tensors)
    (tmp_path / "other" / "config.json").write_text(json.dumps(COMMON | config))
    with pytest.raises(CheckpointError, match="has only down, up"):
        reshard(tmp_path / "other", tmp_path / "out2", tp=2)
