"""Rank files in SGLang: what a rank reads, and the launches that they do not fit. Needs torch, and no engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from ep2tp.checkpoint.reshard import reshard
from ep2tp.engines.rank_files import RankFiles
from ep2tp.engines.sglang.ranks_loader import rank_weights
from ep2tp.errors import CheckpointError, LaunchError
from tests.checkpoint.checkpoints import Model, load, same_bits


def model_on(rank: int, ranks: int, per_rank: int, ep: int = 1) -> torch.nn.Module:
    """A model whose one layer says of itself what SGLang's ``FusedMoE`` does."""
    layer = torch.nn.Module()
    layer.moe_tp_size, layer.moe_tp_rank, layer.moe_ep_size = ranks, rank, ep
    layer.intermediate_size_per_partition, layer.dispatcher = per_rank, SimpleNamespace()
    return torch.nn.ModuleList([layer])


def test_each_rank_finds_its_own_slice_where_sglang_looks_for_it(tmp_path: Path) -> None:
    source = Model(size=320).write(tmp_path / "source")
    reshard(source, tmp_path / "padded", tp=3)
    reshard(source, tmp_path / "ranks", tp=3, layout="ranks")
    padded, shared = load(tmp_path / "padded"), load(tmp_path / "ranks" / "shared")
    per_rank = json.loads((tmp_path / "ranks" / "config.json").read_text())["moe_intermediate_size"] // 3
    for rank in range(3):
        views = dict(rank_weights(tmp_path / "ranks", model_on(rank, 3, per_rank)))
        assert views.keys() == padded.keys()
        for name, whole in padded.items():
            assert views[name].shape == whole.shape
            if name in shared:
                assert same_bits(views[name], whole)
            else:  # as FusedMoE's _load_w13 and _load_w2 narrow
                axis = 1 if "down_proj" in name else 0
                width = whole.shape[axis] // 3
                cuts = (tensor.narrow(axis, rank * width, width) for tensor in (views[name], whole))
                assert same_bits(*cuts), name


def test_launches_that_do_not_fit(tmp_path: Path) -> None:
    source = Model(size=320).write(tmp_path / "source")
    reshard(source, tmp_path / "ranks", tp=2, layout="ranks")
    per_rank = json.loads((tmp_path / "ranks" / "config.json").read_text())["moe_intermediate_size"] // 2
    rounded_up = model_on(0, 2, per_rank + 64)  # as FlashInfer's TRT-LLM runner does
    for model in (model_on(0, 4, per_rank), model_on(0, 2, per_rank, ep=2), rounded_up, torch.nn.Module()):
        with pytest.raises(LaunchError, match="--tp-size 2"):
            next(rank_weights(tmp_path / "ranks", model))


def test_only_rank_files_are_taken_for_rank_files(tmp_path: Path) -> None:
    source = Model(size=320).write(tmp_path / "source")
    assert not RankFiles.are_in(source)
    reshard(source, tmp_path / "padded", tp=3)
    assert not RankFiles.are_in(tmp_path / "padded")
    (source / "ep2tp.json").write_text('{"layout": "ranks"}')
    assert RankFiles.are_in(source)
    with pytest.raises(CheckpointError, match="damaged"):
        next(rank_weights(source, model_on(0, 2, 160)))
