"""``ep2tp tune`` on a GPU: it times both kernels, and what it writes is read by a launch and by stock vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")

from click.testing import CliRunner
from fp8_checkpoint import BlockModel

from ep2tp.cli import main
from ep2tp.kernels import tuned_configs
from ep2tp.kernels.tune import TOKENS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("fp8", [True, False])
def test_what_is_tuned_is_read(tmp_path: Path, note: Any, monkeypatch: pytest.MonkeyPatch, fp8: bool) -> None:
    model, out = tmp_path / "config.json", tmp_path / "out"
    model.write_text(json.dumps(BlockModel(expert_size=2048, fp8=fp8).config()))
    result = CliRunner().invoke(main, ["tune", str(model), "--tp", "8", "--seconds", "40", "--out", str(out)])
    note(output=result.output.splitlines())
    assert result.exit_code == 0, result.output
    [table] = out.glob("*.json")
    lines = tuned_configs.read_table(table)[(16, 1024, 256, 4)]
    assert [most for most, _ in lines] == list(TOKENS[: len(lines)])
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(out / "vllm"))
    fused_moe.get_moe_configs.cache_clear()
    key = ("fp8_w8a8", 128, 128) if fp8 else (None, 0, 0)
    found = fused_moe.get_moe_configs(16, 256, *key)
    fused_moe.get_moe_configs.cache_clear()
    [file] = (out / "vllm").iterdir()
    assert found == {int(tokens): config for tokens, config in json.loads(file.read_text()).items()}
    assert set(found) == set(TOKENS)
