"""The kernel's tests run on a CPU in Triton's interpreter, which has to be chosen before triton is imported."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
