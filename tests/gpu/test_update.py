"""Weights given to a running vLLM in place (``reload_weights``), on two ranks whose FP8 experts ep2tp padded.

Two checkpoints hold different tables (``recall_blocks.py``): after the update every token has to be the new one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from engines import NO_PLUGINS, Case, Engines
from generate import prompts
from recall_blocks import RecallBlockModel, right_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OLD, NEW = RecallBlockModel(), RecallBlockModel(seed=7)
GIVEN = prompts(OLD.vocabulary)
MODELS = {
    "old": OLD,
    "new": NEW,
    "old_stored": RecallBlockModel(stored_for=2),
    "new_stored": RecallBlockModel(seed=7, stored_for=2),
}
CASES = [
    Case("update_none", "old", ranks=2, ep=True, ep2tp="on"),
    Case("update_stock", "old_stored", ranks=2, ep2tp=NO_PLUGINS, update="new_stored"),
    Case("update_padded", "old", ranks=2, ep=True, ep2tp="on", update="new"),
    Case("update_kernel", "old", ranks=2, ep=True, ep2tp="on", kernel="ep2tp", update="new"),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, out: Path) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("updates")
    checkpoints = {name: model.write(folder / name) for name, model in MODELS.items()}
    running = Engines(CASES, checkpoints, out, torch.cuda.device_count())
    yield running
    running.close()


def test_without_an_update_tokens_are_the_old_tables(engines: Engines, note: Any) -> None:
    """The tests below can fail."""
    old, new = (right_tokens(engines["update_none"], model, GIVEN) for model in (OLD, NEW))
    note(old=old, new=new)
    assert old == 1 and new < 0.1


@pytest.mark.parametrize("case", ["update_stock", "update_padded", "update_kernel"])
def test_after_the_update_tokens_are_the_new_tables(engines: Engines, note: Any, case: str) -> None:
    right = right_tokens(engines[case], NEW, GIVEN)
    note(case=case, right=right)
    assert right == 1


def test_the_updated_model_is_a_padded_one(engines: Engines) -> None:
    [rank, _] = engines["update_padded"].facts["ranks"]
    assert {tuple(shape) for name, shape in rank["shapes"].items() if name.endswith("w2_weight")} == {(16, 1024, 768)}
