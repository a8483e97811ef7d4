"""Fused expert tensors: gpt-oss (interleaved rows, MXFP4), Llama-4 (halves, transposed), Qwen3.5 (halves)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from tests.checkpoint.checkpoints import Stored, load, same_bits, save, values

HIDDEN, SIZE, EXPERTS = 64, 96, 3
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 28,
    "num_key_value_heads": 28,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "vocab_size": 448,
}
RNG = np.random.default_rng(0)


def write(folder: Path, config: dict[str, Any], tensors: Stored) -> Path:
    folder.mkdir()
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(COMMON | config))
    return folder


def gpt_oss() -> tuple[dict[str, Any], Stored]:
    prefix = "model.layers.0.mlp.experts."
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": SIZE,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]},
    }
    return config, {
        prefix + "gate_up_proj_blocks": values(RNG, "U8", EXPERTS, 2 * SIZE, HIDDEN // 32, 16),
        prefix + "gate_up_proj_scales": values(RNG, "U8", EXPERTS, 2 * SIZE, HIDDEN // 32),
        prefix + "gate_up_proj_bias": values(RNG, "BF16", EXPERTS, 2 * SIZE),
        prefix + "down_proj_blocks": values(RNG, "U8", EXPERTS, HIDDEN, SIZE // 32, 16),
        prefix + "down_proj_scales": values(RNG, "U8", EXPERTS, HIDDEN, SIZE // 32),
        prefix + "down_proj_bias": values(RNG, "BF16", EXPERTS, HIDDEN),
    }


def test_gpt_oss(tmp_path: Path) -> None:
    config, old = gpt_oss()
    source = write(tmp_path / "source", config, old)
    reshard(source, tmp_path / "out", tp=2)
    new = load(tmp_path / "out")
    prefix = "model.layers.0.mlp.experts."
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 128
    for name, zero in (("blocks", 0), ("scales", 127), ("bias", 0)):
        before, after = old[f"{prefix}gate_up_proj_{name}"], new[f"{prefix}gate_up_proj_{name}"]
        for part in range(2):  # gate rows are even, up rows odd
            assert same_bits(after[:, part::2][:, :SIZE], before[:, part::2])
            assert (after[:, part::2][:, SIZE:] == zero).all()
    for name, zero in (("blocks", 0), ("scales", 127)):
        before, after = old[f"{prefix}down_proj_{name}"], new[f"{prefix}down_proj_{name}"]
        assert after.shape[2] == 4 and same_bits(after[:, :, :3], before) and (after[:, :, 3:] == zero).all()
    assert same_bits(new[prefix + "down_proj_bias"], old[prefix + "down_proj_bias"])
    verify(tmp_path / "out", source)


def test_gpt_oss_in_ranks(tmp_path: Path) -> None:
    """Slices of interleaved rows are contiguous; down's bias, which is added once, is not sliced."""
    config, old = gpt_oss()
    source = write(tmp_path / "source", config, old)
    reshard(source, tmp_path / "padded", tp=2)
    reshard(source, tmp_path / "ranks", tp=2, layout="ranks")
    slices = [load(tmp_path / "ranks" / f"rank-{rank}-of-2") for rank in range(2)]
    shared, prefix = load(tmp_path / "ranks" / "shared"), "model.layers.0.mlp.experts."
    assert shared.keys() == {prefix + "down_proj_bias"}
    for name, whole in load(tmp_path / "padded").items():
        if name in shared:
            assert same_bits(shared[name], whole)
        else:
            axis = 1 if "gate_up" in name else 2
            assert same_bits(torch.cat([tensors[name] for tensors in slices], axis), whole)
    verify(tmp_path / "ranks", source)


def llama4() -> tuple[dict[str, Any], Stored]:
    config = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": SIZE,
        "intermediate_size_mlp": SIZE,
    }
    return config, _halves("model.layers.0.feed_forward.experts.", transposed=True)


def qwen3_5() -> tuple[dict[str, Any], Stored]:
    config = {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": SIZE,
    }
    return config, _halves("model.layers.0.mlp.experts.", transposed=False)


def _halves(prefix: str, transposed: bool) -> Stored:
    gate_up, down = values(RNG, "BF16", EXPERTS, 2 * SIZE, HIDDEN), values(RNG, "BF16", EXPERTS, HIDDEN, SIZE)
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    return {prefix + "gate_up_proj": gate_up, prefix + "down_proj": down}


@pytest.mark.parametrize("scale", ["_scale_inv", "_weight_scale"])
def test_halves_in_fp8_blocks(tmp_path: Path, scale: str) -> None:
    """Each half of gate and up has block scales of its own, of which the last is for a block that is partly filled."""
    hidden, size, prefix = 256, 192, "model.layers.0.mlp.experts."
    config = qwen3_5()[0] | {
        "hidden_size": hidden,
        "moe_intermediate_size": size,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    old = {
        prefix + "gate_up_proj": values(RNG, "F8_E4M3", EXPERTS, 2 * size, hidden),
        prefix + "gate_up_proj" + scale: values(RNG, "F32", EXPERTS, 2 * 2, hidden // 128),
        prefix + "down_proj": values(RNG, "F8_E4M3", EXPERTS, hidden, size),
        prefix + "down_proj" + scale: values(RNG, "F32", EXPERTS, hidden // 128, 2),
    }
    source = write(tmp_path / "source", config, old)
    reshard(source, tmp_path / "out", tp=3)
    new = load(tmp_path / "out")
    for name, before in old.items():
        axis, parts = (1, 2) if "gate_up" in name else (2, 1)
        one = 1.0 if name.endswith(scale) else 0.0
        for small, large in zip(before.chunk(parts, axis), new[name].chunk(parts, axis), strict=True):
            real = small.shape[axis]
            assert large.shape[axis] == (3 if name.endswith(scale) else 384)
            assert same_bits(large.narrow(axis, 0, real), small)
            assert (large.narrow(axis, real, large.shape[axis] - real).float() == one).all()
    verify(tmp_path / "out", source)


@pytest.mark.parametrize(("model", "axes"), [(llama4, (2, 1)), (qwen3_5, (1, 2))])
def test_halves(tmp_path: Path, model: Any, axes: tuple[int, int]) -> None:
    config, old = model()
    source = write(tmp_path / "source", config, old)
    reshard(source, tmp_path / "out", tp=7)
    reshard(source, tmp_path / "ranks", tp=7, layout="ranks")
    new, slices = load(tmp_path / "out"), [load(tmp_path / "ranks" / f"rank-{rank}-of-7") for rank in range(7)]
    padded = 112
    for (name, before), axis, parts in zip(old.items(), axes, (2, 1), strict=True):
        halves = zip(before.chunk(parts, axis), new[name].chunk(parts, axis), strict=True)
        for part, (small, large) in enumerate(halves):
            assert large.shape[axis] == padded
            assert same_bits(large.narrow(axis, 0, SIZE), small)
            assert not large.narrow(axis, SIZE, padded - SIZE).any()
            assert torch.equal(torch.cat([s[name].chunk(parts, axis)[part] for s in slices], axis), large)
    verify(tmp_path / "out", source)
    verify(tmp_path / "ranks", source)
