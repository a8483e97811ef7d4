from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ep2tp.demo.tiny import TinyModel

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # read when SGLang is imported


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which :func:`tiny_model` keeps what it wrote."""
    return tmp_path_factory.mktemp("models")


def tiny_model(folder: Path, model: TinyModel) -> Path:
    """Write a tiny checkpoint once per session; float32, so that the order of summation cannot change a token."""
    target = folder / hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    return target if (target / "config.json").exists() else model.write(target, "float32")
