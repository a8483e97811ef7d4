"""BF16 and FP8 128x128 blocks, I=1408 over two ranks, in SGLang 0.5.17 on GPUs: EP recipes rewritten to TP.

With one GPU, only what runs on one rank is checked. With two, the sharp test is the same as for vLLM: padding appends
zeros and moves the slices by whole blocks, so two rewritten ranks must give *the same numbers* as the stock engine at
TP=2 on a checkpoint that was stored with those zeros. Against one rank every tensor-parallel engine differs in what it
rounds, and the stock engine's distance is the floor.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from fp8_checkpoint import BlockModel

from ep2tp.demo.launch import run_logged

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

HERE = Path(__file__).parent
JOBS = int(os.environ.get("GPU_TEST_JOBS", "3"))
ONE_ENGINE = 200.0  # seconds; the first one builds kernels
CHECKPOINTS = {"fp8": BlockModel(), "fp8_stored": BlockModel(stored_for=2), "bf16": BlockModel(fp8=False)}
EP: dict[str, Any] = {"tp_size": 2, "ep_size": 2}
DEEPEP: dict[str, Any] = {"tp_size": 2, "moe_a2a_backend": "deepep", "enable_dp_attention": True, "dp_size": 2}
TP: dict[str, Any] = {"tp_size": 2}
# name: checkpoint, engine arguments, EP2TP
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "fp8_one_rank": ("fp8", {}, "off"),
    "fp8_ep2tp_ep": ("fp8", EP, "on"),
    "fp8_ep2tp_deepep": ("fp8", DEEPEP, "on"),
    "fp8_stored": ("fp8_stored", TP, "off"),
    "fp8_stock_tp": ("fp8", TP, "off"),
    "fp8_stored_one_rank": ("fp8_stored", {}, "off"),
    "bf16_one_rank": ("bf16", {}, "off"),
    "bf16_ep2tp_ep": ("bf16", EP, "on"),
    "bf16_ep2tp_deepep": ("bf16", DEEPEP, "on"),
    "bf16_stock_tp": ("bf16", TP, "off"),
    "bf16_stock_deepep": ("bf16", DEEPEP, "off"),
}
REWRITTEN = ["fp8_ep2tp_ep", "fp8_ep2tp_deepep", "bf16_ep2tp_ep", "bf16_ep2tp_deepep"]


@dataclass(frozen=True)
class Run:
    """What came of a case."""

    name: str
    status: int
    log: str
    result: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Tokens, log-probabilities, and what the server was resolved to."""
        assert self.status == 0, f"{self.name} failed ({self.status}):\n{self.log[-4000:]}"
        return dict(json.loads(self.result.read_text()))


class Engines:
    """Starts the cases that fit this machine in order, the first one alone, and then some at a time."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.folder, self.logs = folder, logs
        gpus = torch.cuda.device_count()
        fitting = [name for name, (_, options, _) in CASES.items() if options.get("tp_size", 1) <= gpus]
        first, *rest = fitting
        self.runs: dict[str, Future[Run]] = {first: Future()}
        self.runs[first].set_result(self.run(first))  # builds the kernels
        self.pool = ThreadPoolExecutor(JOBS)
        self.runs |= {name: self.pool.submit(self.run, name) for name in rest}

    def __getitem__(self, name: str) -> Run:
        if name not in self.runs:
            pytest.skip("needs two GPUs")
        return self.runs[name].result()

    def run(self, name: str) -> Run:
        checkpoint, options, mode = CASES[name]
        result, log = self.logs / f"{name}.json", self.logs / f"{name}.log"
        place = {"base_gpu_id": 1} if name == "bf16_one_rank" and torch.cuda.device_count() > 1 else {}
        port = {"port": 31000 + 200 * list(CASES).index(name)}
        command = [sys.executable, str(HERE / "sglang_generate.py"), str(self.folder / checkpoint), str(result)]
        command += ["--engine", json.dumps({**options, **place, **port, "dtype": "bfloat16"})]
        status = run_logged(command, os.environ | {"EP2TP": mode, "PYTHONUNBUFFERED": "1"}, log, ONE_ENGINE)
        if result.exists() and "GENERATED" in log.read_text(errors="replace"):
            status = 0  # SGLang ends its own process group when it shuts down
        return Run(name, status, log.read_text(errors="replace"), result)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, out: Path) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in CHECKPOINTS.items():
        model.write(folder / name)
    running = Engines(folder, out)
    yield running
    running.pool.shutdown(cancel_futures=True)


def distance(a: Run, b: Run) -> dict[str, Any]:
    """How near two runs are, over every step up to and including the first at which their tokens differ."""
    differences, same, steps = [], [], 0
    for prompt, (left, right) in enumerate(zip(a.facts["tokens"], b.facts["tokens"], strict=True)):
        steps += len(left)
        for step, (x, y) in enumerate(zip(left, right, strict=True)):
            p, q = a.facts["logprobs"][prompt][step], b.facts["logprobs"][prompt][step]
            differences += [abs(p[token] - q[token]) for token in p.keys() & q.keys()]
            same.append(x == y and p == q)
            if x != y:
                break
    return {
        "a": a.name,
        "b": b.name,
        "identical": all(same) and len(same) == steps,
        "same_tokens": a.facts["tokens"] == b.facts["tokens"],
        "compared": f"{len(same)}/{steps}",
        "mean_logprob_difference": sum(differences) / len(differences),
    }


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
