"""ep2tp's fused-MoE kernel in SGLang on a GPU: eager, with CUDA graphs, and on two ranks.

Random weights in FP8 part after a token or two, whichever kernel runs, so that in FP8 the experts hold a table
(``recall_blocks.py``) and every token has to be the table's. In BF16 both kernels do the same arithmetic up to the
order of sums: what they differ by is compared with what FP8 differs by from its values in BF16 (``twin``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from fp8_checkpoint import BlockModel, Twin
from recall_blocks import RecallBlockModel, right_tokens
from sglang_engines import Case, Engines, distance
from sglang_generate import prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TABLE = RecallBlockModel(dense_size=2816)
CHECKPOINTS = {"table": TABLE, "fp8": BlockModel(), "twin": Twin()}
TRITON: dict[str, Any] = {"moe_runner_backend": "triton"}
GRAPHS = TRITON | {"disable_cuda_graph": False, "disable_prefill_cuda_graph": True, "cuda_graph_max_bs_decode": 4}
EP = TRITON | {"tp_size": 2, "ep_size": 2}
CASES = [
    Case("kernel_engine", "table", TRITON, "auto"),
    Case("kernel_ep2tp", "table", TRITON, "auto", "ep2tp"),
    Case("kernel_graphs", "table", GRAPHS, "auto", "ep2tp"),
    Case("kernel_fp8", "fp8", TRITON, "auto"),
    Case("kernel_twin", "twin", TRITON, "auto"),
    Case("kernel_twin_ep2tp", "twin", TRITON, "auto", "ep2tp"),
    Case("kernel_two_ranks", "table", EP, "on", "ep2tp"),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, out: Path) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in CHECKPOINTS.items():
        model.write(folder / name)
    running = Engines(CASES, folder, out, first_port=41000)
    yield running
    running.close()


@pytest.mark.parametrize("case", ["kernel_ep2tp", "kernel_twin_ep2tp", "kernel_graphs", "kernel_two_ranks"])
def test_the_log_says_that_the_kernel_runs(engines: Engines, note: Any, case: str) -> None:
    run = engines[case]
    assert run.status == 0, run.log[-4000:]
    lines = re.findall(r"ep2tp kernel: .*", run.log)
    note(lines=lines)
    size, form = (768 if "two_ranks" in case else 1408), ("bf16" if "twin" in case else "fp8-128x128")
    assert lines
    assert all(f"2 MoE layers: ep2tp's on E=16 K=1024 I={size} top 4 {form}" in line for line in lines)


@pytest.mark.parametrize("case", ["kernel_engine", "kernel_fp8", "kernel_twin"])
def test_the_engines_kernel_is_left_alone_on_request(engines: Engines, case: str) -> None:
    assert engines[case].status == 0, engines[case].log[-4000:]
    assert "ep2tp kernel:" not in engines[case].log


@pytest.mark.parametrize("case", ["kernel_engine", "kernel_ep2tp", "kernel_graphs", "kernel_two_ranks"])
def test_tokens_are_the_tables(engines: Engines, note: Any, case: str) -> None:
    right = right_tokens(engines[case], TABLE, prompts())
    note(case=case, right=right)
    assert right == 1


def test_in_bf16_both_kernels_differ_by_rounding_alone(engines: Engines, note: Any) -> None:
    found = {case: distance(engines["kernel_twin"], engines[case]) for case in ("kernel_fp8", "kernel_twin_ep2tp")}
    note(**found)
    rounding, quantising = (found[case]["mean_logprob_difference"] for case in ("kernel_twin_ep2tp", "kernel_fp8"))
    assert rounding < quantising / 2
