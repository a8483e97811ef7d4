"""Two kinds of tests: those in Triton's interpreter, which ``TRITON_INTERPRET=1`` chooses, and those that compile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

_INTERPRETED = {"test_fused_moe.py", "test_dequant.py"}  # run by `make test-kernels`
_COMPILED = {"test_compile.py"}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot run in this process."""
    left_out = _COMPILED if os.environ.get("TRITON_INTERPRET") == "1" else _INTERPRETED
    return True if collection_path.name in left_out else None
