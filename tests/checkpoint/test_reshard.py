"""What reshard checks before it writes, and what it writes beside the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ep2tp.checkpoint import destination
from ep2tp.checkpoint.header import build_header
from ep2tp.checkpoint.reader import read_header
from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from ep2tp.errors import CheckpointError, ModelError, SettingError
from ep2tp.model.dtypes import item_bytes
from tests.checkpoint.checkpoints import Model, Stored, load, save, values, write_files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Model("fp8_block_f32").write(tmp_path_factory.mktemp("models") / "source")


def test_files_beside_the_weights(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = reshard(source, out, tp=2)
    assert result.status == "done"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert {key for key in before if before[key] != after[key]} == {"moe_intermediate_size", "intermediate_size"}
    assert (after["moe_intermediate_size"], after["intermediate_size"]) == (256, 512)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "inference" / "generate.py").is_file()
    assert not (out / ".ep2tp").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in load(out).values())
    for name, file in index["weight_map"].items():
        assert any(tensor.name == name for tensor in read_header(out / file).tensors)
    assert reshard(source, out, tp=2).status == "complete"


def test_transformers_reads_the_config(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reshard(source, tmp_path / "out", tp=2)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.moe_intermediate_size == 256


def test_nothing_to_pad(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reshard(source, out, tp=1).status == "unneeded"
    assert not out.exists()
    assert reshard(source, out, tp=1, link=True).status == "done"
    for path in source.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert verify(out, source).tensors > 0


def test_fingerprint_changes_with_what_decides_the_output(tmp_path: Path) -> None:
    """Apart from the identity of the source, which changes with each folder here."""
    model = Model("bf16", files=1)

    def fingerprint(name: str, tensors: Stored = model.tensors(), tp: int = 7, **config: Any) -> str:  # noqa: B008
        folder = tmp_path / name
        folder.mkdir()
        write_files(folder, tensors, 1)
        (folder / "config.json").write_text(json.dumps(model.config() | config))
        layout = "ranks" if "ranks" in name else "padded"
        conversion = reshard(folder, tmp_path / "out", tp=tp, layout=layout, dry_run=True).conversion  # type: ignore[arg-type]
        return replace(conversion, identity={}).fingerprint()

    tensors, embedding = model.tensors(), "model.embed_tokens.weight"
    found = [
        fingerprint("padded"),
        fingerprint("ranks"),
        fingerprint("padded for 5", tp=5),
        fingerprint("ranks for 5", tp=5),
        fingerprint("another config", rope_theta=1.0),
        fingerprint("another dtype", tensors | {embedding: tensors[embedding].half()}),
        fingerprint("another shape", tensors | {embedding: tensors[embedding].reshape(-1)}),
        fingerprint("another tensor", tensors | {"model.norm.weight": torch.zeros(4)}),
        fingerprint("another name", {name.replace("embed_tokens", "embed"): tensors[name] for name in tensors}),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint("padded again") == found[0]


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = reshard(source, tmp_path / "out", tp=2, dry_run=True)
    assert result.status == "planned" and sum(result.conversion.sizes().values()) > result.conversion.source_bytes
    assert not list(tmp_path.iterdir())


def test_destinations_that_are_refused(source: Path, tmp_path: Path) -> None:
    for out in (source, source / "out", source.parent):
        with pytest.raises(CheckpointError, match="must not lie in"):
            reshard(source, out, tp=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all my work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"did not write|not written by ep2tp"):
            reshard(source, tmp_path / "full", tp=2, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_another_conversion_needs_overwrite(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", tp=2)
    with pytest.raises(CheckpointError, match="--overwrite"):
        reshard(source, tmp_path / "out", tp=4)
    reshard(source, tmp_path / "out", tp=4, overwrite=True)
    assert json.loads((tmp_path / "out" / "ep2tp.json").read_text())["ranks"] == 4
    verify(tmp_path / "out", source)


def test_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = destination.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="Make room"):
        reshard(source, tmp_path / "out", tp=2)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 0},
        {"tp": 2, "layout": "rows"},
        {"tp": 2, "ranks": [0]},
        {"tp": 2, "finish": True},
        {"tp": 2, "layout": "ranks", "ranks": [2]},
        {"tp": 2, "layout": "ranks", "ranks": []},
        {"tp": 2, "layout": "ranks", "ranks": [0], "finish": True},
        {"tp": 2, "layout": "ranks", "link": True},
    ],
)
def test_contradicting_options(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        reshard(source, tmp_path / "out", **options)


EXPERT = "model.layers.1.mlp.experts.0"


def _changed(tmp_path: Path, model: Model = Model("fp8_block_f32"), **change: Any) -> Path:  # noqa: B008
    """A checkpoint in which tensors are replaced, or taken away where the new one is None."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    tensors = model.tensors() | change
    write_files(folder, {name: t for name, t in tensors.items() if t is not None}, 2)
    (folder / "config.json").write_text(json.dumps(model.config()))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{EXPERT}.up_proj.weight": torch.zeros(3, 256, dtype=torch.float8_e4m3fn)}, "does not match its config"),
        ({f"{EXPERT}.up_proj.weight_scale_inv": torch.zeros(2, 3)}, "does not match its config"),
        ({f"{EXPERT}.up_proj.weight_scale_inv": None}, "mean nothing without scales"),
        ({f"{EXPERT}.up_proj.weight": None, f"{EXPERT}.up_proj.weight_scale_inv": None}, "some are missing"),
        ({f"{EXPERT}.up_proj.weight": torch.zeros(192, 256, dtype=torch.int8)}, "dtype I8"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        reshard(_changed(tmp_path, **change), tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_scales_of_rows_in_a_format_with_one_scale(tmp_path: Path) -> None:
    """Each rank would take the scales of all rows for its own."""
    model = Model("fp8_channel")
    source = model.write(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"shape .*, 1\]; fp8_tensor stores a single value"):
        reshard(source, tmp_path / "out", tp=7)
    assert not (tmp_path / "out").exists()


def test_a_weight_shape_of_three_values(tmp_path: Path) -> None:
    model = Model("int4_g32", size=320)
    source = _changed(tmp_path, model, **{f"{EXPERT}.gate_proj.weight_shape": torch.tensor([320, 256, 1])})
    with pytest.raises(CheckpointError, match=r"shape \[3\]; int4_g32 stores the two values"):
        reshard(source, tmp_path / "out", tp=7)
    assert not (tmp_path / "out").exists()


def test_a_group_index_that_is_out_of_order(tmp_path: Path) -> None:
    name = f"{EXPERT}.down_proj.g_idx"
    model = Model("gptq")
    source = _changed(tmp_path, model, **{name: torch.flip(model.tensors()[name], [0])})
    with pytest.raises(CheckpointError, match="not as quantization_config says"):
        reshard(source, tmp_path / "out", tp=7)


def test_activation_order_is_refused(tmp_path: Path) -> None:
    source = Model("gptq").write(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="desc_act=true"):
        reshard(source, tmp_path / "out", tp=2)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"n_routed_experts": 10**9}, {"hidden_size": 10**12}, {"hidden_size": "x"}]
)
def test_sizes_that_no_model_has(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected a positive integer up to"):
        reshard(tmp_path / "source", tmp_path / "out", tp=2)


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    source = Model().write(tmp_path / "source")
    (tmp_path / "secret.txt").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match="outside of"):
        reshard(source, tmp_path / "out", tp=7)
    (source / "notes.txt").unlink()
    weights = sorted(source.glob("*.safetensors"))[0]
    weights.rename(tmp_path / weights.name)
    weights.symlink_to(tmp_path / weights.name)
    with pytest.raises(CheckpointError, match="outside of"):
        reshard(source, tmp_path / "out", tp=7)
    assert not (tmp_path / "out").exists()


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    model = Model().write(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    assert reshard(snapshot, tmp_path / "out", tp=7).status == "done"


def test_pickles_are_not_carried(tmp_path: Path) -> None:
    source = Model().write(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"never read")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    reshard(source, tmp_path / "out", tp=7)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists() and not (tmp_path / "out" / ".git").exists()


def test_order_by_size_where_padding_would_misalign(tmp_path: Path) -> None:
    """PyTorch's reader needs each tensor to begin on a multiple of its element's size."""
    model = Model("fp8_block_e8m0", size=384, shared=1, dense=384, files=1)  # each MLP's scales grow by 6 bytes
    source = model.write(tmp_path / "source")
    path = next(source.glob("*.safetensors"))
    data, tensors = path.read_bytes(), read_header(path).tensors
    narrow_first = [("model.norm.weight", "F32", (1,), 4), *((t.name, t.dtype, t.shape, t.size) for t in tensors)]
    narrow_first.append(("model.filler", "BF16", (1,), 2))
    narrow_first.sort(key=lambda tensor: item_bytes(tensor[1]))
    content = {t.name: data[t.offset : t.offset + t.size] for t in tensors}
    content |= {"model.filler": bytes(2), "model.norm.weight": bytes(4)}
    path.write_bytes(
        build_header({"format": "pt"}, narrow_first) + b"".join(content[name] for name, *_ in narrow_first)
    )
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(content, path.name)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(tensor.offset % item_bytes(tensor.dtype) == 0 for tensor in read_header(path).tensors)
    reshard(source, tmp_path / "out", tp=2)
    for tensor in read_header(tmp_path / "out" / path.name).tensors:
        assert tensor.offset % item_bytes(tensor.dtype) == 0, tensor
    verify(tmp_path / "out", source)


def test_large_tensors_in_blocks(tmp_path: Path) -> None:
    """Rows and tensors beyond one window of memory: a fused tensor whose rows are 12 MB."""
    config = {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 750,
        "vocab_size": 64,
    }
    import numpy as np

    rng = np.random.default_rng(0)
    prefix = "model.layers.0.mlp.experts."
    tensors = {
        prefix + "gate_up_proj": values(rng, "BF16", 2, 1500, 2048),
        prefix + "down_proj": values(rng, "BF16", 2, 2048, 750),
    }
    (tmp_path / "source").mkdir()
    save(tmp_path / "source" / "model.safetensors", tensors)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    reshard(tmp_path / "source", tmp_path / "out", tp=4)
    new = load(tmp_path / "out")
    padded = json.loads((tmp_path / "out" / "config.json").read_text())["moe_intermediate_size"]
    assert padded % 4 == 0 and padded > 750
    for half in range(2):
        old = tensors[prefix + "gate_up_proj"][:, half * 750 : half * 750 + 750]
        rows = new[prefix + "gate_up_proj"][:, half * padded : (half + 1) * padded]
        assert torch.equal(rows[:, :750], old) and not rows[:, 750:].any()
    assert torch.equal(new[prefix + "down_proj"][..., :750], tensors[prefix + "down_proj"])
    verify(tmp_path / "out", tmp_path / "source")
