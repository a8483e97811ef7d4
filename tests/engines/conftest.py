from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ep2tp.demo.engines import SGLANG, VLLM
from ep2tp.demo.launch import run_engine
from ep2tp.demo.tiny import TinyModel
from ep2tp.planner.topology import Links

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # read when SGLang is imported
# vLLM's scheduler in the process that calls it, one import of vLLM less in each run; servers have it in its own.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

OneRank = Callable[[TinyModel], list[list[int]]]
# Neither the experts' nor the dense layers' size divides by 2.
ODD = TinyModel("deepseek_v3", expert_size=75, shared_experts=2, dense_size=325)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which :func:`tiny_model` keeps what it wrote."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any, bool]]:
    """What ``EP2TP=auto`` asks of each job's links (GPUs, devices, whether it sees its own alone): all are NVLink."""
    seen: list[tuple[int, Any, bool]] = []

    def look(gpus: int, devices: Any, sees_own_gpus_only: bool) -> Links:
        seen.append((gpus, devices, sees_own_gpus_only))
        return Links(True, "test")

    monkeypatch.setenv("EP2TP", "auto")
    monkeypatch.setattr("ep2tp.engines.decision.links_of_job", look)
    return seen


@pytest.fixture(scope="session")
def one_rank(tiny_models: Path) -> OneRank:
    """The 12 greedy tokens of each prompt, of a model on one rank of this environment's engine without ep2tp."""
    engine = SGLANG if find_spec("vllm") is None else VLLM

    @cache
    def tokens(model: TinyModel) -> list[list[int]]:
        folder = tiny_model(tiny_models, model)
        options = {engine.model_argument: str(folder), "dtype": "float32"}
        run = run_engine(tiny_models, f"one-rank-{folder.name}", options, "off", engine)
        assert run.result is not None, run.log[-3000:]
        return [list(found) for found in run.result["tokens"]]

    return tokens


def tiny_model(folder: Path, model: TinyModel) -> Path:
    """Write a tiny checkpoint once per session; float32, so that the order of summation cannot change a token."""
    target = folder / hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    return target if (target / "config.json").exists() else model.write(target, "float32")
