"""``ep2tp detect`` on a real server that runs a rewritten data-parallel recipe: endpoint, processes, log."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.launch import PROMPTS
from ep2tp.observe.source import read_source
from ep2tp.observe.verdict import judge
from tests.engines.conftest import ODD, tiny_model
from tests.engines.test_vllm_serve import served

pytestmark = pytest.mark.engine


def test_a_rewritten_recipe_is_seen_as_tp_from_every_side(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    server = served(tiny_model(tiny_models, ODD), tiny_models, nodes=1)
    try:
        server.generate(PROMPTS[0], max_tokens=2)
        sources = {
            "server": server.url,
            "process": str(server.processes[0].pid),
            "log": str(server.logs[0]),
        }
        verdicts = {kind: judge(read_source(source)) for kind, source in sources.items()}
    finally:
        server.stop()
    assert {kind: (v.plan.value, v.engine, v.confidence) for kind, v in verdicts.items()} == dict.fromkeys(
        sources, ("TP", "vllm", "high")
    )
    [asked] = [piece for piece in verdicts["server"].evidence if "tensor_parallel_size=2" in piece.text]
    assert "enable_expert_parallel=False" in asked.text
