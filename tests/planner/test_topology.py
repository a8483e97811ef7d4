"""The decision about links, on a stand-in for NVML: this machine has no GPU; what is tested is how answers are used."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ep2tp.engines.decision import decide
from ep2tp.engines.vllm.arguments import RULES
from ep2tp.planner.topology import links_of_job, visible_gpus
from ep2tp.settings import Mode

EP_FLAG = RULES.triggers[0]


class NVMLError(Exception):
    pass


def use_nvml(monkeypatch: pytest.MonkeyPatch, gpus: int, joined: set[frozenset[int]]) -> None:
    """GPUs 0..gpus-1, of which the pairs in ``joined`` have NVLink; handles are the GPUs' numbers."""

    def by_index(index: int) -> int:
        if not 0 <= index < gpus:
            raise NVMLError("Invalid Argument")
        return index

    def by_uuid(uuid: bytes) -> int:
        for gpu in range(gpus):
            if uuid.decode() == f"GPU-{gpu}{gpu}":
                return gpu
        raise NVMLError("Not Found")

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_P2P_CAPS_INDEX_NVLINK=2,
        NVML_P2P_STATUS_OK=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: gpus,
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}{handle}",
        nvmlDeviceGetP2PStatus=lambda a, b, caps: 0 if frozenset((a, b)) in joined else 6,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


PAIRS_01_23 = {frozenset((0, 1)), frozenset((2, 3))}
ALL_OF_4 = {frozenset((a, b)) for a in range(4) for b in range(a)}


@pytest.mark.parametrize(
    ("joined", "visible", "gpus", "expected"),
    [
        (ALL_OF_4, None, 4, True),
        (ALL_OF_4, None, 2, True),
        (PAIRS_01_23, None, 2, True),  # the job's GPUs are joined, all of them would not be
        (PAIRS_01_23, None, 4, False),
        (PAIRS_01_23, "1,2", 2, False),
        (PAIRS_01_23, "3,2", 2, True),
        (PAIRS_01_23, "GPU-22,GPU-33", 2, True),
        (PAIRS_01_23, "3, 2,9", 2, True),
        (ALL_OF_4, None, 8, False),  # spans nodes
        (set(), None, 2, False),
    ],
)
def test_every_pair_of_the_jobs_gpus_counts(
    joined: set[frozenset[int]], visible: str | None, gpus: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml(monkeypatch, 4, joined)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert links_of_job(gpus).all_nvlink is expected


@pytest.mark.parametrize(
    ("devices", "visible", "expected"),
    [
        ((1, 2), None, False),
        ((2, 3), None, True),
        ((0, 1), "2,3", True),
        ((0, 1), "1,2", False),
        (("GPU-22", "GPU-33"), None, True),
        ((3, 4), None, False),
    ],
)
def test_gpus_that_a_launch_names_count(
    devices: tuple[int | str, ...], visible: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml(monkeypatch, 4, PAIRS_01_23)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert links_of_job(2, devices).all_nvlink is expected


@pytest.mark.parametrize(
    ("joined", "gpus", "expected"), [(ALL_OF_4, 4, True), (ALL_OF_4, 8, False), (PAIRS_01_23, 2, False)]
)
def test_gpus_that_other_processes_of_the_job_see_count(
    joined: set[frozenset[int]], gpus: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml(monkeypatch, 4, joined)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert not links_of_job(gpus).all_nvlink
    assert links_of_job(gpus, sees_own_gpus_only=True).all_nvlink is expected


@pytest.mark.parametrize(
    ("visible", "handles", "bad"),
    [
        ("", [], None),
        ("-1", [], None),
        ("2,-1,0", [2], None),
        ("1, 0", [1, 0], None),
        ("3,4,0", [3], "4"),
        ("-2,0", [], "-2"),
        ("0,,1", [0], ""),
        ("GPU-3,GPU-11", [3, 1], None),  # the first is cut short
        ("0,GPU-,1", [0], "GPU-"),  # four GPUs begin so
        ("1,GPU-9", [1], "GPU-9"),
        ("none", [], "none"),
    ],
)
def test_the_gpus_before_the_first_entry_that_names_none(
    visible: str, handles: list[int], bad: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml(monkeypatch, 4, ALL_OF_4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = visible_gpus(sys.modules["pynvml"])
    assert found.handles == handles
    says = f"CUDA_VISIBLE_DEVICES={visible}: {bad!r} does not name one of this machine's 4 GPUs"
    assert found.problem.startswith(says) if bad is not None else not found.problem
    assert found.problem in links_of_job(4).why


@pytest.mark.parametrize(
    ("mode", "gpus", "rewrite", "why"),
    [
        (Mode.AUTO, 4, False, "all 4 GPUs are joined by NVLink"),
        (Mode.ON, 4, True, "EP2TP=on"),
        (Mode.OFF, 4, False, "EP2TP=off"),
        (Mode.ON, 1, False, "one GPU"),
        (Mode.AUTO, 8, True, "8 GPUs and this machine shows 4"),
    ],
)
def test_decisions(mode: Mode, gpus: int, rewrite: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, 4, ALL_OF_4)
    decision = decide(mode, EP_FLAG, gpus)
    assert decision.rewrite is rewrite
    assert why in decision.why


def test_a_machine_without_a_driver_counts_as_not_joined() -> None:
    pytest.importorskip("pynvml")
    links = links_of_job(2)
    if "driver" not in links.why:
        pytest.skip("this machine has an NVIDIA driver")
    assert not links.all_nvlink
