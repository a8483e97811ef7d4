"""NCCL's COLL lines: in the format of ``enqueue.cc`` (NCCL 2.27), as engines' collectives print them."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep2tp.observe.boot_log import read_log
from ep2tp.observe.evidence import Plan
from ep2tp.observe.tally import Tally, in_words
from ep2tp.observe.verdict import Verdict, judge


def line(kind: str, count: int, root: int = 0, ranks: int = 2, device: int = 0, datatype: int = 9) -> str:
    return (
        f"node1:{700 + device}:{900 + device} [{device}] NCCL INFO {kind}: opCount 2f sendbuff 0x7f00 recvbuff 0x7f01 "
        f"count {count} datatype {datatype} op 0 root {root} comm 0x55d0 [nranks={ranks}] stream 0x55aa task 0 globalrank {device}\n"  # noqa: E501
    )


def step_of_tensor_parallel(tokens: int, layers: int = 4) -> str:
    """Embedding, then attention and MLP of each layer, then the logits."""
    return line("AllReduce", tokens * 256) * (2 * layers + 1) + line("AllGather", tokens * 384)


def exchange(ranks: int, count: int = 512, with_self: bool = True, device: int = 0) -> str:
    """torch's all_to_all_single: a send and a receive for every rank, in one group."""
    peers = [r for r in range(ranks) if with_self or r != device]
    return "".join(line("Send", count, r, ranks) + line("Recv", count, r, ranks) for r in peers)


def of_text(text: str) -> Verdict:
    return judge(read_log(io.StringIO(text)))


def test_only_all_reduce_is_tp_or_tep() -> None:
    verdict = of_text(step_of_tensor_parallel(17) + step_of_tensor_parallel(1) * 20)
    assert verdict.plan is Plan.UNKNOWN
    assert verdict.fits == {Plan.TP, Plan.TEP}


def test_a_step_is_found_and_told_by_kind_and_bytes() -> None:
    verdict = of_text(step_of_tensor_parallel(17) + step_of_tensor_parallel(1) * 20)
    [step] = [piece.text for piece in verdict.evidence if "one step" in piece.reading.says]
    assert sorted(step.split(", ")) == ["1 all_gather of 768 B", "9 all_reduce of 512 B"]


def test_the_boot_log_and_nccls_lines_decide_together() -> None:
    boot = "(Worker_TP0_EP0 pid=3) INFO 11-24 20:22:36 [base_loader.py:82] Initializing model took 0.3 seconds\n"
    assert of_text(boot + step_of_tensor_parallel(1) * 4).plan is Plan.TEP


@pytest.mark.parametrize(("ranks", "with_self"), [(2, True), (4, True), (4, False), (8, False)])
def test_grouped_sends_and_receives_are_all_to_all(ranks: int, with_self: bool) -> None:
    layer = line("AllReduce", 256, ranks=ranks) + exchange(ranks, with_self=with_self) * 2
    verdict = of_text(layer * 12)
    assert verdict.plan is Plan.DEP
    [first] = [piece for piece in verdict.evidence if piece.reading.plans == {Plan.DEP}]
    assert first.line == 2
    assert "24 all_to_all" in first.reading.says


def test_a_pipelines_transfers_are_no_dispatch() -> None:
    middle_stage = line("Recv", 512, 0, 4) + line("AllReduce", 256) * 4 + line("Send", 512, 2, 4)
    assert of_text(middle_stage * 8).fits == {Plan.TP, Plan.TEP}
    two_stages = line("AllReduce", 256) * 4 + line("Send", 512, 1) + line("Recv", 8, 1)
    assert of_text(two_stages * 8).fits == {Plan.TP, Plan.TEP}


@pytest.mark.parametrize(("gather", "scatter"), [("AllGather", "ReduceScatter"), ("Broadcast", "Reduce")])
def test_gathering_and_scattering_back_is_dep_with_low_confidence(gather: str, scatter: str) -> None:
    layer = line(gather, 512) * 3 + line(scatter, 512)
    verdict = of_text(layer * 12)
    assert (verdict.plan, verdict.confidence) == (Plan.DEP, "low")


def test_other_ranks_and_groups_of_one_rank_are_not_counted() -> None:
    mixed = line("AllReduce", 256) + line("AllReduce", 256, device=1) + line("ReduceScatter", 9, ranks=1)
    verdict = of_text(mixed * 5)
    assert any("5 all_reduce calls" in piece.reading.says for piece in verdict.evidence)


def test_a_log_without_the_coll_subsystem_says_so() -> None:
    [piece] = read_log(
        io.StringIO("node1:7:9 [0] NCCL INFO ncclCommInitRank comm 0x1 rank 0 nranks 2 - Init COMPLETE\n")
    )
    assert "NCCL_DEBUG_SUBSYS=COLL" in piece.reading.says


CALLS = st.lists(st.tuples(st.sampled_from(["all_reduce", "all_gather"]), st.integers(1, 3)), min_size=1, max_size=30)


@given(before=CALLS, step=CALLS, repeats=st.integers(3, 8))
def test_any_repeated_step_is_found(before: list[tuple[str, int]], step: list[tuple[str, int]], repeats: int) -> None:
    """Or a multiple of it; unless kinds of calls that recurred before it are missing from it."""
    tally = Tally()
    for kind, size in [*before, *step * repeats]:
        tally.add(kind, size)
    found = tally.step()
    if {kind for kind, _ in before} <= {kind for kind, _ in step}:
        assert found is not None
    if found is not None:
        assert [*before, *step * repeats][-2 * len(found) :] == found * 2


def test_a_uniform_layer_is_not_taken_for_a_step() -> None:
    """122 equal calls and one other: the step is 123 calls long, though its end looks like a period of one."""
    tally = Tally()
    for _ in range(9):
        for kind in ["all_gather"] + ["all_reduce"] * 122:
            tally.add(kind, 4096)
    assert in_words(tally.step() or []) in (
        "1 all_gather of 4.1 KB, 122 all_reduce of 4.1 KB",
        "122 all_reduce of 4.1 KB, 1 all_gather of 4.1 KB",
    )


def test_what_does_not_repeat_has_no_step() -> None:
    tally = Tally()
    for i in range(200):
        tally.add("all_reduce", i)
    assert tally.step() is None
