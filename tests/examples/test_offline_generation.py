"""The example of offline generation on a real vLLM: the recipe, rewritten, against one rank without ep2tp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.engines import CPU_ENVIRONMENT

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"


def generated(output: Path, gpus: int, mode: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / "offline_generation.py"), "tiny", "--gpus", str(gpus), *options]
    environment = os.environ | CPU_ENVIRONMENT | {"EP2TP": mode}
    done = subprocess.run(
        [*command, "--output", str(output)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def test_the_recipe_has_the_tokens_of_a_stock_launch(tmp_path: Path) -> None:
    rewritten, stock = tmp_path / "rewritten.jsonl", tmp_path / "stock.jsonl"
    assert "rewrote this launch to tensor parallelism" in generated(rewritten, 2, "auto")
    assert "ep2tp 0" not in generated(stock, 1, "off", "--stock")
    compared = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare_tokens.py"), str(stock), str(rewritten)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert compared.stdout.splitlines() == [f"prompt {i}: 12 tokens equal" for i in range(3)]
