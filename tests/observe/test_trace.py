"""Profiler traces: vLLM's own (see ``test_boot_log``), and events as torch writes them on GPUs."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep2tp.errors import SourceError
from ep2tp.observe.evidence import Plan
from ep2tp.observe.source import read_source
from ep2tp.observe.trace import kernel_kind, read_trace
from ep2tp.observe.verdict import Verdict, judge
from tests.observe.recordings import LOGS


def of_events(events: list[dict[str, Any]], as_list: bool = False) -> Verdict:
    value = events if as_list else {"schemaVersion": 1, "traceEvents": events}
    return judge(read_trace(io.BytesIO(json.dumps(value).encode())))


def kernel(name: str) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": 1.5, "dur": 2.0, "args": {"stream": 7}}


def test_collectives_are_told_per_moe_layer() -> None:
    """8 steps of a model with a dense and two MoE layers: embedding, 3 attentions, 3 MLPs; the logits are gathered."""
    verdict = judge(read_source(str(LOGS / "vllm-0.32.0-tp2.trace.json.gz")))
    [per_layer] = [piece for piece in verdict.evidence if "per MoE layer" in piece.reading.says]
    assert per_layer.text == "56 all_reduce, 8 all_gather; 16 passes through MoE layers (_C::cpu_fused_moe)"
    [step] = [piece for piece in verdict.evidence if "one step" in piece.reading.says]
    assert step.text == "7 all_reduce, 1 all_gather"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_reduce"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send_recv"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce_scatter"),
        ("ncclDevKernel_Reduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce"),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*)", "all_reduce"),
        ("void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<...>()", "all_reduce"),
        ("void deep_ep::internode_ll::dispatch<true, false, 7168>(void*)", "dispatch"),
        ("void deep_ep::intranode::combine<__nv_bfloat16, 8, 768>(void*)", "combine"),
        ("void vllm::moe::topkGating<8, 256>(float const*)", None),
        ("fused_moe_kernel", None),
        ("void cub::DeviceReduceKernel<...>()", None),
    ],
)
def test_kernels(name: str, kind: str | None) -> None:
    assert kernel_kind(name) == kind


def test_kernels_of_an_all_to_all_library_are_decisive() -> None:
    verdict = of_events([kernel("void deep_ep::internode_ll::dispatch<>()"), kernel("ncclDevKernel_AllReduce_Sum()")])
    assert (verdict.plan, verdict.confidence) == (Plan.DEP, "high")


def test_an_exchange_in_every_layer_is_dispatch_and_one_a_step_a_pipeline() -> None:
    layer = [kernel("moe_align_block_size_kernel"), kernel("ncclDevKernel_AllReduce_Sum_bf16")]
    transfer = [kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)")]
    assert of_events((layer + transfer * 2) * 8).plan is Plan.DEP
    assert of_events((layer * 4 + transfer) * 8).fits == {Plan.TP, Plan.TEP}


@pytest.mark.parametrize("as_list", [True, False])
def test_where_gpu_kernels_are_operators_are_not_counted_again(as_list: bool) -> None:
    operator = {"ph": "X", "cat": "cpu_op", "name": "c10d::allreduce_", "ts": 1, "dur": 1}
    events = [operator, kernel("ncclDevKernel_AllReduce_Sum_bf16"), kernel("moe_align_block_size_kernel")]
    verdict = of_events(events * 3, as_list)
    assert verdict.fits == {Plan.TP, Plan.TEP}
    assert any(piece.text.startswith("3 all_reduce; 3 passes") for piece in verdict.evidence)


@pytest.mark.parametrize(
    ("title", "plan", "engine"),
    [
        ("VLLM::Worker_TP1", "TP", "vllm"),
        ("VLLM::Worker_DP0_TP0_EP0", "DEP", "vllm"),
        ("sglang::scheduler_TP0", "TP", "sglang"),
        ("python3", "unknown", None),
    ],
)
def test_the_process_name_tells_tp_from_tep(title: str, plan: str, engine: str | None) -> None:
    name = {"ph": "M", "name": "process_name", "pid": 3, "args": {"name": title}}
    verdict = of_events([name, kernel("ncclDevKernel_AllReduce_Sum_bf16")])
    assert (verdict.plan.value, verdict.engine) == (plan, engine)


WORDS = st.sampled_from(["M", "X", "process_name", "kernel", "cpu_op", "VLLM::Worker_TP0", "c10d::allreduce_"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("name"), inner, max_size=3),
    max_leaves=6,
)
EVENTS = JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("ph", "name", "cat", "args"), WORDS | JSON))


@given(value=JSON | st.lists(EVENTS) | st.fixed_dictionaries({"traceEvents": st.lists(EVENTS) | JSON}))
def test_any_json_gives_a_verdict_or_ep2tps_own_error(value: Any) -> None:
    with contextlib.suppress(SourceError):  # numbers that JSON does not have
        assert judge(read_trace(io.BytesIO(json.dumps(value).encode()))).plan in Plan


@pytest.mark.parametrize(
    "arguments", [None, [], "VLLM::Worker_TP0", {}, {"name": None}, {"name": ["VLLM::Worker_TP0"]}]
)
def test_a_process_without_a_name_takes_nothing_from_the_others(arguments: Any) -> None:
    nameless = {"ph": "M", "name": "process_name", "args": arguments}
    worker = {"ph": "M", "name": "process_name", "args": {"name": "VLLM::Worker_TP1"}}
    verdict = of_events([nameless, worker, kernel("ncclDevKernel_AllReduce_Sum_bf16")])
    assert (verdict.plan, verdict.engine) == (Plan.TP, "vllm")


def test_a_title_with_a_number_too_long_to_be_a_rank() -> None:
    title = "VLLM::Worker_TP" + "9" * 5000
    assert of_events([{"ph": "M", "name": "process_name", "args": {"name": title}}]).plan is Plan.TP


def test_names_that_are_nested_deeply() -> None:
    trace = b'[{"ph": "X", "name": ' + b"[" * 5000 + b"]" * 5000 + b"}]"
    assert judge(read_trace(io.BytesIO(trace))).plan is Plan.UNKNOWN


_MEASURE = """
from ep2tp.observe.source import read_source
from ep2tp.observe.verdict import judge
found = sorted(judge(read_source("-")).fits)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(*found, peak)
"""


def test_memory_does_not_grow_with_the_trace() -> None:
    def peak(layers: int) -> int:
        layer = json.dumps([kernel("ncclDevKernel_AllReduce_Sum_bf16"), *[kernel("gemm")] * 30])[1:-1].encode()
        trace = b'{"traceEvents": [' + b",".join([layer] * layers) + b"]}"
        run = subprocess.run([sys.executable, "-c", _MEASURE], input=gzip.compress(trace, 1), stdout=-1, check=True)
        *fits, kilobytes = run.stdout.split()
        assert fits == [b"TEP", b"TP"]
        return int(kilobytes)

    assert peak(10_000) < peak(100) + 8_000  # 30 MB of JSON


def test_a_broken_trace_is_one_error(tmp_path: Path) -> None:
    whole = gzip.decompress((LOGS / "vllm-0.32.0-tp2.trace.json.gz").read_bytes())
    (tmp_path / "cut.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"cut.json: not a readable profiler trace"):
        list(read_source(str(tmp_path / "cut.json")))
    packed = (LOGS / "vllm-0.32.0-tp2.trace.json.gz").read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(SourceError, match=r"cut.json.gz"):
        list(read_source(str(tmp_path / "cut.json.gz")))


def test_a_log_of_json_lines_is_no_trace(tmp_path: Path) -> None:
    line = {"level": "INFO", "message": "ep2tp 0.1.0 rewrote this launch to tensor parallelism: --ep on 2 GPUs"}
    (tmp_path / "log.json").write_text(json.dumps(line) + "\n")
    assert judge(read_source(str(tmp_path / "log.json"))).plan is Plan.TP
