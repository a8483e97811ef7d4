"""BF16 and FP8 128x128 blocks, I=1408 over two ranks, in SGLang 0.5.17 on GPUs: EP recipes rewritten to TP.

With one GPU, only what runs on one rank is checked. With two, the sharp test is the same as for vLLM: padding appends
zeros and moves the slices by whole blocks, so two rewritten ranks must give *the same numbers* as the stock engine at
TP=2 on a checkpoint that was stored with those zeros. Against one rank every tensor-parallel engine differs in what it
rounds, and the stock engine's distance is the floor.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from fp8_checkpoint import BlockModel
from sglang_engines import Case, Engines, Run, distance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CHECKPOINTS = {"fp8": BlockModel(), "fp8_stored": BlockModel(stored_for=2), "bf16": BlockModel(fp8=False)}
EP: dict[str, Any] = {"tp_size": 2, "ep_size": 2}
DEEPEP: dict[str, Any] = {"tp_size": 2, "moe_a2a_backend": "deepep", "enable_dp_attention": True, "dp_size": 2}
TP: dict[str, Any] = {"tp_size": 2}
CASES = [
    Case("fp8_one_rank", "fp8"),
    Case("fp8_ep2tp_ep", "fp8", EP, "on"),
    Case("fp8_ep2tp_deepep", "fp8", DEEPEP, "on"),
    Case("fp8_stored", "fp8_stored", TP),
    Case("fp8_stock_tp", "fp8", TP),
    Case("fp8_stored_one_rank", "fp8_stored"),
    Case("bf16_one_rank", "bf16", gpu=1),
    Case("bf16_ep2tp_ep", "bf16", EP, "on"),
    Case("bf16_ep2tp_deepep", "bf16", DEEPEP, "on"),
    Case("bf16_stock_tp", "bf16", TP),
    Case("bf16_stock_deepep", "bf16", DEEPEP),
]
REWRITTEN = ["fp8_ep2tp_ep", "fp8_ep2tp_deepep", "bf16_ep2tp_ep", "bf16_ep2tp_deepep"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, out: Path) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in CHECKPOINTS.items():
        model.write(folder / name)
    running = Engines(CASES, folder, out, first_port=31000)
    yield running
    running.close()


def compared(a: Run, b: Run, note: Any) -> dict[str, Any]:
    found = distance(a, b)
    note(**found)
    return found


def test_stock_deepep_stops_with_an_import_error(engines: Engines, note: Any) -> None:
    run = engines["bf16_stock_deepep"]
    note(status=run.status, errors=re.findall(r"\w+Error: .*", run.log)[:3])
    assert run.status != 0
    assert "ImportError: DeepEP is not" in run.log  # "installed" in 0.5.17, "available" in 0.5.23


def test_stock_tp_refuses_blocks_that_do_not_divide(engines: Engines, note: Any) -> None:
    run = engines["fp8_stock_tp"]
    note(status=run.status, errors=re.findall(r"\w+Error: .*", run.log)[:3])
    assert run.status != 0
    assert re.search(r"not divisible by weight quantization block", run.log)


@pytest.mark.parametrize("name", REWRITTEN)
def test_launch_is_rewritten(engines: Engines, note: Any, name: str) -> None:
    run = engines[name]
    note(**{key: run.facts[key] for key in ("resolved", "start_seconds", "generate_seconds")})
    resolved = run.facts["resolved"]
    assert (resolved["tp_size"], resolved["ep_size"], resolved["moe_a2a_backend"]) == (2, 1, "none")
    assert "rewrote this launch to tensor parallelism" in run.log
    assert not re.search(r"TP\d EP\d", run.log)
    assert "expert parallel size is adjusted" not in run.log
    if name.startswith("fp8"):
        assert re.search(r"routed \(moe_intermediate_size\)\s+1408\s+1536", run.log)
        assert re.search(r"shared \(moe_intermediate_size\)\s+1408\s+1536", run.log)
        assert re.search(r"dense \(intermediate_size\)\s+2944\s+3072", run.log)


@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("fp8_ep2tp_ep", "fp8_stored"),
        ("fp8_ep2tp_deepep", "fp8_stored"),
        ("bf16_ep2tp_ep", "bf16_stock_tp"),
        ("bf16_ep2tp_deepep", "bf16_stock_tp"),
    ],
)
def test_equals_stock_tensor_parallelism(engines: Engines, note: Any, name: str, stock: str) -> None:
    """FP8: on a checkpoint that was stored with the padding. BF16 needs none."""
    assert compared(engines[name], engines[stock], note)["identical"]


def test_padding_alone(engines: Engines, note: Any) -> None:
    """On one rank, the checkpoint stored with padding gives the numbers of the checkpoint without."""
    assert compared(engines["fp8_stored_one_rank"], engines["fp8_one_rank"], note)["identical"]


@pytest.mark.parametrize(
    ("name", "stock", "one_rank"),
    [("fp8_ep2tp_ep", "fp8_stored", "fp8_one_rank"), ("bf16_ep2tp_ep", "bf16_stock_tp", "bf16_one_rank")],
)
def test_agrees_with_one_rank(engines: Engines, note: Any, name: str, stock: str, one_rank: str) -> None:
    floor = compared(engines[stock], engines[one_rank], note)["mean_logprob_difference"]
    found = compared(engines[name], engines[one_rank], note)["mean_logprob_difference"]
    assert found <= 1.05 * floor + 1e-6


def test_a_machine_with_two_gpus_ran_everything(note: Any) -> None:
    driver = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    note(gpus=torch.cuda.device_count(), torch=torch.__version__, devices=driver)
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: the two-rank tests above were skipped")
