"""Checkpoints that ep2tp wrote, in real vLLM on this CPU: the tokens of the source on one rank."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from ep2tp.checkpoint.reshard import reshard
from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.launch import PROMPTS, EngineRun, run_engine
from tests.engines.conftest import ODD, OneRank, tiny_model
from tests.engines.serving import Server
from tests.recall import RecallModel

pytestmark = pytest.mark.engine

EXAMPLE = Path(__file__).parents[2] / "examples" / "reshard_and_serve.py"


def run(folder: Path, label: str, model: Path, **options: object) -> EngineRun:
    engine = {"model": str(model), "dtype": "float32", "tensor_parallel_size": 2, **options}
    found = run_engine(folder, label, engine, "off")
    assert found.result is not None, found.log[-3000:]
    return found


def test_padded_checkpoint_is_served_by_stock_vllm(tmp_path: Path, one_rank: OneRank) -> None:
    """By examples/reshard_and_serve.py, whose tiny model is this one."""
    options = ["--skip-tokenizer-init", "--tokens-only", "--max-model-len", "256", "--enforce-eager"]

    def padded(port: int) -> Path:
        return tmp_path / f"padded-{port}"

    def commands(port: int) -> dict[Path, list[str]]:
        command = [sys.executable, str(EXAMPLE), "tiny", str(padded(port)), "--tp", "2", "--port", str(port)]
        return {tmp_path / "serve.log": [*command, *options, "--dtype", "float32"]}

    server = Server(commands, CPU_ENVIRONMENT)
    try:
        tokens = [server.generate(prompt, max_tokens=12) for prompt in PROMPTS]
    finally:
        text = server.stop()
    assert tokens == one_rank(ODD)
    assert "tensors equal" in text and "Worker_TP1" in text and "ep2tp 0" not in text
    config = json.loads((padded(server.port) / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["intermediate_size"]) == (80, 336)


def test_rank_files_in_vllm(tiny_models: Path, one_rank: OneRank) -> None:
    folder = tiny_models / "ranks"
    reshard(tiny_model(tiny_models, ODD), folder, tp=2, layout="ranks")
    ranks = run(tiny_models, "resharded-ranks", folder, load_format="ep2tp")
    assert ranks.result is not None
    assert ranks.result["tokens"] == one_rank(ODD)
    read = {int(rank): float(size) * 1e9 for rank, size in re.findall(r"rank (\d) of 2 read ([\d.]+) GB", ranks.log)}
    manifest = json.loads((folder / "ep2tp.json").read_text())
    sizes = {name: entry["size"] for name, entry in manifest["outputs"].items()}
    for rank, size in read.items():
        own = sum(sizes[name] for name in sizes if name.startswith((f"rank-{rank}-", "shared/")))
        assert size <= 1.02 * own
    assert sorted(read) == [0, 1]


def test_padded_bf16_checkpoint_gives_the_tokens_that_its_experts_hold(tmp_path: Path) -> None:
    """Experts that hold a table have margins wide enough for BF16, which random weights have not."""
    model = RecallModel(dense_size=325, heads=4)
    source = model.write(tmp_path / "source")
    reshard(source, tmp_path / "padded", tp=2)
    answer, expected = model.answer().tolist(), []
    for token in (prompt[-1] for prompt in PROMPTS):
        chain = [token]
        while len(chain) <= 12:
            chain.append(answer[chain[-1]])
        expected.append(chain[1:])
    found = run(tmp_path, "padded", tmp_path / "padded", dtype="bfloat16")
    assert found.result is not None and found.result["tokens"] == expected
