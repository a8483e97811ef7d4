"""What ``ep2tp reshard`` wrote, served on two ranks by a vLLM that does not load ep2tp: FP8 128x128 blocks, I=1408."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from engines import NO_PLUGINS, Case, Engines, agreement
from fp8_checkpoint import BlockModel
from generate import prompts
from recall_blocks import RecallBlockModel, right_tokens

from ep2tp.checkpoint.reshard import reshard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


RECALL = RecallBlockModel()
GIVEN = prompts(RECALL.vocabulary)
MODELS = {"recall": RECALL, "random": BlockModel(), "random_stored": BlockModel(stored_for=2)}
CASES = [
    Case("recall_one_rank", "recall", ep2tp=NO_PLUGINS),
    Case("recall_resharded", "recall_resharded", ranks=2, ep2tp=NO_PLUGINS),
    Case("recall_wrong_scales", "recall_wrong_scales", ranks=2, ep2tp=NO_PLUGINS),
    Case("recall_ep2tp", "recall", ranks=2, ep=True, ep2tp="on"),
    Case("recall_ranks", "recall_ranks", ranks=2, engine={"load_format": "ep2tp"}),
    Case("random_resharded", "random_resharded", ranks=2, ep2tp=NO_PLUGINS),
    Case("random_stored", "random_stored", ranks=2, ep2tp=NO_PLUGINS),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, out: Path) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("resharded")
    folders = {name: model.write(folder / name) for name, model in MODELS.items()}
    for name in ("recall", "random"):
        reshard(folders[name], folder / f"{name}_resharded", tp=2)
    reshard(folders["recall"], folder / "recall_ranks", tp=2, layout="ranks")
    wrong_scales(folder / "recall_resharded", folder / "recall_wrong_scales")
    running = Engines(CASES, {path.name: path for path in folder.iterdir()}, out, torch.cuda.device_count())
    yield running
    running.close()


def wrong_scales(source: Path, folder: Path) -> None:
    """The checkpoint with each expert's up scales one block further down, as a loader that cuts blocks has them."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    scales = [name for name in tensors if ".experts." in name and name.endswith("up_proj.weight_scale_inv")]
    save_file(tensors | {name: tensors[name].roll(1, 0) for name in scales}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())


@pytest.mark.parametrize("case", ["recall_resharded", "recall_ranks", "recall_ep2tp"])
def test_tokens_of_one_rank(engines: Engines, note: Any, case: str) -> None:
    one_rank, run = engines["recall_one_rank"], engines[case]
    note(case=case, agreement=str(agreement(one_rank, run)), right=right_tokens(run, RECALL, GIVEN))
    assert right_tokens(one_rank, RECALL, GIVEN) == 1
    assert run.facts["tokens"] == one_rank.facts["tokens"]


def test_wrong_scales_give_other_tokens(engines: Engines, note: Any) -> None:
    """The test above can fail."""
    right = right_tokens(engines["recall_wrong_scales"], RECALL, GIVEN)
    note(right=right)
    assert right < 0.9


def test_stock_engine_did_not_load_ep2tp(engines: Engines) -> None:
    for case in ("recall_resharded", "random_resharded"):
        assert [rank["plugin_was_loaded"] for rank in engines[case].facts["ranks"]] == [False, False]
    assert [rank["plugin_was_loaded"] for rank in engines["recall_ranks"].facts["ranks"]] == [True, True]


def test_logits_of_a_checkpoint_stored_padded(engines: Engines, note: Any) -> None:
    """Against a checkpoint that was stored padded without any of ep2tp's code: the very same numbers."""
    found = agreement(engines["random_resharded"], engines["random_stored"])
    note(agreement=str(found))
    assert found.identical and found.compared == found.steps
