"""The checkpoints of the GPU tests, checked without a GPU, and ep2tp's padding against one that was stored padded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from fp8_checkpoint import BlockModel, dequantize_blocks, quantize_blocks

from ep2tp.checkpoint.reader import check_folder
from ep2tp.engines.weights import padded_weights
from ep2tp.model.facts import read_config, read_facts
from ep2tp.model.families import find_family, load_families
from ep2tp.model.sharding import ShardPlan, plan_shards

SMALL = BlockModel(hidden=256, heads=2, kv_heads=2, experts=2, top_k=1, layers=2, vocabulary=128)


def plan_for(folder: Path, ranks: int) -> ShardPlan:
    config = read_config(folder)
    found = find_family(config, load_families())
    assert found is not None
    return plan_shards(read_facts(config, *found, str(folder)), ranks)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("fp8", [True, False])
def test_plan_accepts_every_tensor(tmp_path: Path, family: str, fp8: bool) -> None:
    folder = replace(SMALL, family=family, fp8=fp8).write(tmp_path)
    plan = plan_for(folder, 2)
    check_folder(folder, plan)
    assert plan.is_padded == fp8


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_padding_equals_a_checkpoint_stored_padded(tmp_path: Path, family: str) -> None:
    model = replace(SMALL, family=family)
    folder = model.write(tmp_path / "given")
    expected = safetensors.load_file(replace(model, stored_for=2).write(tmp_path / "stored") / "model.safetensors")
    given = safetensors.load_file(folder / "model.safetensors")
    padded = dict(padded_weights(given.items(), plan_for(folder, 2)))
    assert padded.keys() == expected.keys()
    for name, tensor in padded.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), expected[name].view(torch.uint8)), name
    assert any(padded[name].shape != given[name].shape for name in given)


def test_quantised_values_are_near() -> None:
    weight = torch.randn(576, 300, generator=torch.Generator().manual_seed(0))
    stored, scale = quantize_blocks(weight)
    assert (stored.shape, scale.shape) == (weight.shape, (5, 3))
    error = (dequantize_blocks(stored, scale) - weight).abs()
    # E4M3 keeps 3 bits after the leading one; below its smallest normal number, steps of 2**-9 remain.
    steps = scale.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :300] * 2.0**-10
    assert (error <= torch.maximum(weight.abs() / 16, steps) * 1.001).all()
