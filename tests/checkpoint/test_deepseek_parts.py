"""DeepSeek's own layout: written here as its converter writes it, read back as the checkpoint it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ep2tp.checkpoint.deepseek_parts import published_name
from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from ep2tp.errors import CheckpointError
from tests.checkpoint.checkpoints import HIDDEN, Model, Stored, load, same_bits, save

MODEL = Model("fp8_block_f32", size=256, shared=2, dense=512, experts=4)

# published module -> DeepSeek's name and the axis that is shared out, from DeepSeek-V3's inference/convert.py
RULES = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}


def original() -> Stored:
    tensors = {name: t for name, t in MODEL.tensors().items() if ".layers.2." not in name}  # no MTP layer
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = random(HIDDEN)
        tensors[prefix + "self_attn.q_a_proj.weight"] = random(32, HIDDEN)
        tensors[prefix + "self_attn.q_a_layernorm.weight"] = random(32)
        tensors[prefix + "self_attn.q_b_proj.weight"] = random(64, 32)
        tensors[prefix + "self_attn.kv_a_proj_with_mqa.weight"] = random(24, HIDDEN)
        tensors[prefix + "self_attn.kv_a_layernorm.weight"] = random(16)
        tensors[prefix + "self_attn.kv_b_proj.weight"] = random(128, 16)
    tensors["model.layers.1.mlp.gate.weight"] = random(4, HIDDEN)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = random(4)
    tensors["model.norm.weight"], tensors["lm_head.weight"] = random(HIDDEN), random(320, HIDDEN)
    return tensors


def parts(tensors: Stored, ranks: int) -> list[Stored]:
    found: list[Stored] = [{} for _ in range(ranks)]
    per_rank = MODEL.experts // ranks
    for name, tensor in tensors.items():
        short = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        short = short.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        key = short.split(".")[-2]
        new, axis = RULES[key]
        short = short.replace(key, new)
        for rank in range(ranks):
            if ".experts." in short:
                if int(short.split(".experts.")[1].split(".")[0]) // per_rank == rank:
                    found[rank][short] = tensor
            else:
                found[rank][short] = tensor if axis is None else tensor.chunk(ranks, axis)[rank]
    return found


def write(folder: Path, ranks: int) -> Stored:
    folder.mkdir()
    tensors = original()
    for rank, part in enumerate(parts(tensors, ranks)):
        save(folder / f"model{rank}-mp{ranks}.safetensors", part)
    (folder / "tokenizer.json").write_text("{}")
    (folder.parent / "config.json").write_text(json.dumps(MODEL.config()))
    return tensors


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_become_the_published_checkpoint(tmp_path: Path, ranks: int) -> None:
    tensors = write(tmp_path / "parts", ranks)
    config = tmp_path / "config.json"
    result = reshard(tmp_path / "parts", tmp_path / "out", tp=1, config=config)
    assert result.status == "done"
    new = load(tmp_path / "out")
    assert new.keys() == tensors.keys()
    for name in tensors:
        assert same_bits(new[name], tensors[name]), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    verify(tmp_path / "out", tmp_path / "parts", config=config)


def test_parts_are_padded_as_the_published_checkpoint_is(tmp_path: Path) -> None:
    tensors = write(tmp_path / "parts", 2)
    (tmp_path / "published").mkdir()
    save(tmp_path / "published" / "model.safetensors", tensors)
    (tmp_path / "published" / "config.json").write_text(json.dumps(MODEL.config()))
    for layout, folder in (("padded", "."), ("ranks", "rank-1-of-3"), ("ranks", "shared")):
        for name, config in (("parts", tmp_path / "config.json"), ("published", None)):
            out = tmp_path / f"{layout}-{name}"
            reshard(tmp_path / name, out, tp=3, layout=layout, config=config)  # type: ignore[arg-type]
        a, b = load(tmp_path / f"{layout}-parts" / folder), load(tmp_path / f"{layout}-published" / folder)
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_missing_parts(tmp_path: Path) -> None:
    write(tmp_path / "parts", 2)
    with pytest.raises(CheckpointError, match="--config"):
        reshard(tmp_path / "parts", tmp_path / "out", tp=3)
    (tmp_path / "parts" / "model0-mp2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model0-mp2"):
        reshard(tmp_path / "parts", tmp_path / "out", tp=3, config=tmp_path / "config.json")


def change(folder: Path, rank: int, **tensors: torch.Tensor) -> None:
    """Replace tensors of one part; ``__`` stands for a dot."""
    path = folder / f"model{rank}-mp2.safetensors"
    save(path, load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()})


def test_parts_that_should_be_alike(tmp_path: Path) -> None:
    """What every part holds whole is compared while it is converted."""
    write(tmp_path / "parts", 2)
    change(tmp_path / "parts", 1, norm__weight=torch.zeros(HIDDEN, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"model1-mp2\.safetensors: norm\.weight: differs .* model0-mp2"):
        reshard(tmp_path / "parts", tmp_path / "out", tp=3, config=tmp_path / "config.json")
    assert not (tmp_path / "out" / "config.json").exists()


def test_parts_of_different_shapes(tmp_path: Path) -> None:
    write(tmp_path / "parts", 2)
    change(tmp_path / "parts", 1, layers__0__attn__wkv_b__weight=torch.zeros(63, 16, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="the 2 parts do not hold it alike"):
        reshard(tmp_path / "parts", tmp_path / "out", tp=3, config=tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensors", [{"layers__0__attn__wo__weight": torch.zeros(4)}, {"embed__weight": torch.tensor(1.0)}]
)
def test_parts_without_the_axis_to_join(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path / "parts", 2)
    for rank in range(2):
        change(tmp_path / "parts", rank, **tensors)
    with pytest.raises(CheckpointError, match="has no axis"):
        reshard(tmp_path / "parts", tmp_path / "out", tp=3, config=tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "parts", 2)
    path = tmp_path / "parts" / "model1-mp2.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="outside of"):
        reshard(tmp_path / "parts", tmp_path / "out", tp=3, config=tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


def test_unknown_names() -> None:
    with pytest.raises(CheckpointError, match="inference/convert"):
        published_name("layers.0.attn.w9.weight")
