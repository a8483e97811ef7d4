"""The kernel runs on a CPU in Triton's interpreter, where ``TRITON_INTERPRET=1`` was set from the start."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEED_INTERPRETER = ["test_fused_moe.py", "test_dequant.py"]


def pytest_ignore_collect(collection_path: object) -> bool | None:
    """Leave the interpreter's tests to ``make test-kernels``."""
    name = str(collection_path).rsplit("/", 1)[-1]
    return True if name in NEED_INTERPRETER and not INTERPRETED else None


pytest.importorskip("torch")
pytest.importorskip("triton")
