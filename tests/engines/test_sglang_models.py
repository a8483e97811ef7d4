"""The planner's tables of what SGLang's model code lacks, against the installed SGLang."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("sglang")

from sglang.srt.models.registry import ModelRegistry

from ep2tp.model.families import load_families
from ep2tp.planner.engine_models import SGLANG_WITHOUT_DP_ATTENTION, SGLANG_WITHOUT_STAGES

ARCHITECTURES = {name for family in load_families().values() for name in family.match.architectures}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES | SGLANG_WITHOUT_STAGES))
def test_pipeline_stages(name: str) -> None:
    found, _ = ModelRegistry.resolve_model_cls([name])
    if found.__name__ != name:
        pytest.skip("SGLang has no code of its own for it")
    takes_stages = "pp_proxy_tensors" in inspect.signature(found.forward).parameters
    assert takes_stages is (name not in SGLANG_WITHOUT_STAGES)


@pytest.mark.parametrize("name", sorted(SGLANG_WITHOUT_DP_ATTENTION))
def test_data_parallel_attention(name: str) -> None:
    """ERNIE's layers take Llama's attention, which divides its heads over all ranks, and gather no tokens."""
    found, _ = ModelRegistry.resolve_model_cls([name])
    source = inspect.getsource(inspect.getmodule(found))
    assert "import LlamaAttention" in source
    assert not any(word in source for word in ("attn_tp", "LayerCommunicator", "dp_gather"))
