"""A folder whose files and index contradict each other is refused; where a checkpoint says how it is quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ep2tp.checkpoint.reshard import reshard
from ep2tp.errors import CheckpointError
from tests.checkpoint.checkpoints import Model, load, save

INDEX = "model.safetensors.index.json"


def _store_twice(folder: Path) -> None:
    """As one is left over from an earlier save of another number of files."""
    (folder / INDEX).unlink()
    save(folder / "model.safetensors", {"model.embed_tokens.weight": torch.zeros(2)})


def _change_index(**weight_map: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
        (folder / INDEX).write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_store_twice, "embed_tokens.weight is in .* and in .*; refused"),
        (_change_index(model__norm__weight="model-00001-of-00002.safetensors"), "it is in no file"),
        (
            _change_index(model__embed_tokens__weight="model-00002-of-00002.safetensors"),
            "it is in model-00001-of-00002",
        ),
        (_change_index(model__norm__weight="model-00003-of-00002.safetensors"), "names model-00003.*which is missing"),
    ],
    ids=["a tensor twice", "a tensor missing", "a tensor elsewhere", "a file missing"],
)
def test_contradictions(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    source = Model().write(tmp_path / "source")
    change(source)
    with pytest.raises(CheckpointError, match=message):
        reshard(source, tmp_path / "out", tp=7)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_null", [False, True])
def test_quantization_in_a_file_of_its_own(tmp_path: Path, is_null: bool) -> None:
    """ModelOpt's older exports: hf_quant_config.json, and nothing of it, or null, in config.json."""
    model = Model("nvfp4_modelopt", size=144)
    source = model.write(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    if is_null:
        config["quantization_config"] = None
    (source / "config.json").write_text(json.dumps(config))
    quantization = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (source / "hf_quant_config.json").write_text(json.dumps(quantization))
    reshard(source, tmp_path / "out", tp=4)
    weight = load(tmp_path / "out")["model.layers.1.mlp.experts.0.down_proj.weight"]
    assert weight.shape[1] == 256 // 2  # packed in pairs, and padded to 64 a rank: whole groups and 16 bytes a row
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == quantization
