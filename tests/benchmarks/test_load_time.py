"""The checkpoints that load_time.py writes, small, and what it empties the page cache of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import page_cache
from load_time import MODELS, TP

from ep2tp.checkpoint.reshard import reshard


@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoints_reshard_and_every_file_is_evicted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]
    small = replace(model, hidden=256, heads=4, experts=4, top_k=2, layers=1 + model.dense_layers)
    source = small.write(tmp_path / "source")
    reshard(source, tmp_path / "ranks", tp=TP, layout="ranks")
    evicted: list[str] = []

    def fadvise(file: int, *_: Any) -> None:
        evicted.append(str(Path(f"/proc/self/fd/{file}").readlink()))

    monkeypatch.setattr(page_cache.os, "posix_fadvise", fadvise)
    for folder in (source, tmp_path / "ranks"):
        page_cache.evict(folder)
    assert sorted(evicted) == sorted(map(str, tmp_path.rglob("*.safetensors")))
    assert sum("/ranks/" in path for path in evicted) >= TP
