"""Slices as whole-sized views: what vLLM's narrowing by rank takes out of them, and how many bytes are read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.load import LoadConfig

from ep2tp.checkpoint.reshard import reshard
from ep2tp.engines.vllm.ranks_loader import RanksLoader
from ep2tp.errors import CheckpointError, LaunchError
from tests.checkpoint.checkpoints import FORMATS, Model, load, same_bits
from tests.checkpoint.test_fused import llama4, qwen3_5, write


def model_on(rank: int, ranks: int, ep: int = 1) -> torch.nn.Module:
    layer = torch.nn.Module()
    parallel = SimpleNamespace(tp_size=ranks, tp_rank=rank, ep_size=ep)
    layer.moe_config = SimpleNamespace(moe_parallel_config=parallel)  # type: ignore[assignment]
    return torch.nn.ModuleList([layer])


def loaded(folder: Path, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    loader = RanksLoader(LoadConfig(load_format="ep2tp"))
    return dict(loader.get_all_weights(SimpleNamespace(model=str(folder)), model_on(rank, ranks)))  # type: ignore[arg-type]


def assert_same_slices(padded: dict[str, torch.Tensor], folder: Path, ranks: int, parts: int = 1) -> None:
    shared = load(folder / "shared")
    for rank in range(ranks):
        views = loaded(folder, rank, ranks)
        assert views.keys() == padded.keys()
        slices = load(folder / f"rank-{rank}-of-{ranks}")
        for name, whole in padded.items():
            assert views[name].shape == whole.shape
            if name in shared:
                assert same_bits(views[name], whole)
                continue
            axis = next(a for a in range(whole.ndim) if whole.shape[a] != slices[name].shape[a])
            count = parts if "gate_up" in name else 1
            for old, new in zip(whole.chunk(count, axis), views[name].chunk(count, axis), strict=True):
                width = old.shape[axis] // ranks  # as vLLM's _load_w13 and _load_w2 narrow
                assert same_bits(new.narrow(axis, rank * width, width), old.narrow(axis, rank * width, width)), name


@pytest.mark.parametrize("name", FORMATS)
def test_views_of_every_format(tmp_path: Path, name: str) -> None:
    source = Model(name, size=320).write(tmp_path / "source")
    reshard(source, tmp_path / "padded", tp=3)
    reshard(source, tmp_path / "ranks", tp=3, layout="ranks")
    assert_same_slices(load(tmp_path / "padded"), tmp_path / "ranks", 3)


@pytest.mark.parametrize("model", [llama4, qwen3_5])
def test_views_of_fused_experts(tmp_path: Path, model: Any) -> None:
    source = write(tmp_path / "source", *model())
    reshard(source, tmp_path / "padded", tp=7)
    reshard(source, tmp_path / "ranks", tp=7, layout="ranks")
    assert_same_slices(load(tmp_path / "padded"), tmp_path / "ranks", 7, parts=2)


def test_bytes_read(tmp_path: Path) -> None:
    """By the operating system's own counter: at most 1.02 x (expert bytes / ranks + other bytes)."""
    source = Model(size=1024, experts=16, shared=1).write(tmp_path / "source")
    reshard(source, tmp_path / "ranks", tp=4, layout="ranks")
    sizes = {name: t.numel() * t.element_size() for name, t in load(source).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    bound = 1.02 * (experts / 4 + sum(sizes.values()) - experts)
    loaded(tmp_path / "ranks", 2, 4)  # imports are done
    before = _read_so_far()
    loaded(tmp_path / "ranks", 2, 4)
    assert 0 < _read_so_far() - before <= bound


def _read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_launches_that_do_not_fit(tmp_path: Path) -> None:
    source = Model().write(tmp_path / "source")
    reshard(source, tmp_path / "ranks", tp=2, layout="ranks")
    loader = RanksLoader(LoadConfig(load_format="ep2tp"))
    config: Any = SimpleNamespace(model=str(tmp_path / "ranks"))
    for model in (model_on(0, 4), model_on(0, 2, ep=2), torch.nn.Module()):
        with pytest.raises(LaunchError, match="--tensor-parallel-size 2"):
            next(loader.get_all_weights(config, model))
    config.model = str(source)
    with pytest.raises(CheckpointError, match="no finished conversion"):
        next(loader.get_all_weights(config, model_on(0, 2)))
    manifest = json.loads((tmp_path / "ranks" / "ep2tp.json").read_text()) | {"layout": "padded"}
    (source / "ep2tp.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="leave out"):
        next(loader.get_all_weights(config, model_on(0, 2)))


def test_every_file_of_the_manifest_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    reshard(Model().write(tmp_path / "source"), folder, tp=2, layout="ranks")
    expected = loaded(folder, 1, 2)
    mine = sorted((folder / "rank-1-of-2").glob("*.safetensors"))
    (mine[0].parent / "zzz.safetensors").write_bytes(next((folder / "shared").glob("*.safetensors")).read_bytes())
    assert loaded(folder, 1, 2).keys() == expected.keys()
    assert len(loaded(folder, 1, 2)) == len(expected)
    size = mine[0].stat().st_size
    with mine[0].open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(CheckpointError, match=f"{size - 1} bytes, ep2tp.json says {size}"):
        loaded(folder, 1, 2)
    mine[0].unlink()
    with pytest.raises(CheckpointError, match="missing"):
        loaded(folder, 1, 2)
