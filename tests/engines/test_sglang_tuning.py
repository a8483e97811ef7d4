"""The file that ``ep2tp tune`` writes for SGLang's own kernel, as the installed SGLang reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang")

SGLANG = """
import sys
from pathlib import Path
from ep2tp.engines.sglang import tuning
from tests.kernels.test_tune import ENGINE_CONFIG, meta_down, write_engine_file
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as sglang

sglang.get_device_name = lambda: "NVIDIA H100"
get_moe_configs = sglang.get_moe_configs
tuning.publish_arguments()
written = write_engine_file(tuning, Path(sys.argv[1]))
assert written.parent.parent.name == "configs" and written.parent.name.startswith("triton_"), written
assert get_moe_configs(16, 256, "fp8_w8a8", 128, 128) == {1: ENGINE_CONFIG, 16: ENGINE_CONFIG}
assert tuning.default_config(meta_down(), 4, 14) == ENGINE_CONFIG
assert get_moe_configs(16, 512, "fp8_w8a8", 128, 128) is None
print("READ", written.name)
"""


def test_real_sglang_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / "sglang"))
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    child = subprocess.run([sys.executable, "-c", SGLANG, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert "READ E=16,N=256,device_name=NVIDIA_H100,dtype=fp8_w8a8,block_shape=[128, 128].json" in child.stdout
