"""The resharder runs where neither torch nor an engine is installed."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from ep2tp.checkpoint import commands, reshard, verify
print(*(name for name in ("torch", "vllm", "sglang", "transformers", "safetensors") if name in sys.modules))
"""


def test_neither_torch_nor_an_engine_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
