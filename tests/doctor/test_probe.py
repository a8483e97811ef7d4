"""The P2P probe, in its own process, on a stand-in for the driver; on GPUs it runs in ``tests/gpu/test_doctor.py``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ep2tp.doctor.kernels import PTX
from ep2tp.doctor.probe import Unproven, check_bytes
from ep2tp.doctor.transfers import Proof, probe_pair, read_proof
from tests.doctor.machines import STEPS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("driver")
    source = str(HERE / "stand_in_cuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), source], check=True)
    return folder


@pytest.fixture
def probe(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stand_in))

    def run(mode: str, limit_s: float = 30.0, second: str = "0000:02:00.0") -> Proof:
        monkeypatch.setenv("STAND_IN", mode)
        return probe_pair("0000:01:00.0", second, limit_s)

    return run


def test_all_steps_are_proven(probe) -> None:
    assert probe("") == Proof(dict.fromkeys(STEPS, True), {})


@pytest.mark.parametrize(
    ("mode", "broken", "because"),
    [
        ("corrupt", ["copy forth", "copy back"], "1 of 8388608 bytes are wrong, the first at 8388601"),
        ("refuse", ["copy forth"], "cuCtxEnablePeerAccess: CUDA_ERROR_STAND_IN (217)"),
        ("die", ["copy forth"], "the probe ended with status -6"),
    ],
)
def test_what_goes_wrong_is_reported(probe, mode: str, broken: list[str], because: str) -> None:
    proof = probe(mode)
    assert proof.broken == broken
    assert because in proof.because[broken[0]]


def test_lost_atomics_are_told_and_leave_the_transfers_proven(probe) -> None:
    proof = probe("lost_atomics")
    lost = "511994 of 512000 atomic additions arrived"
    assert proof.because == {"atomics forth": lost, "atomics back": lost}
    assert not proof.broken
    assert proof.has("write")
    assert not proof.has("atomics")


@pytest.mark.timeout(60)
def test_a_hang_is_ended_and_names_its_step(probe) -> None:
    proof = probe("hang", limit_s=8.0)
    assert proof.because == {"copy forth": "no end after 8 s"}


@pytest.mark.parametrize(
    ("mode", "kinds"), [("no_p2p", {"copy"}), ("no_atomics", {"copy", "write", "read"})]
)  # fmt: skip
def test_what_the_driver_does_not_offer_is_not_tried(probe, mode: str, kinds: set[str]) -> None:
    proof = probe(mode)
    assert not proof.broken
    assert {step.split()[0] for step in proof.proven} == kinds


def test_a_gpu_that_is_not_there_is_no_proof(probe) -> None:
    proof = probe("", second="0000:0f:00.0")
    assert proof.failed == "cuDeviceGetByPCIBusId: CUDA_ERROR_STAND_IN (101)"


def test_gpus_without_free_memory_are_no_proof(probe) -> None:
    assert probe("no_memory") == Proof({}, {}, "cuMemAlloc_v2: CUDA_ERROR_STAND_IN (2)")


def test_no_driver_is_no_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    proof = probe_pair("0000:01:00.0", "0000:02:00.0")
    if not proof.failed:
        pytest.skip("this machine has an NVIDIA driver")
    assert "libcuda.so.1 cannot be loaded" in proof.failed or "cu" in proof.failed


def test_a_single_wrong_byte_is_found() -> None:
    check_bytes(b"abc" * 99, b"abc" * 99)
    with pytest.raises(Unproven, match="1 of 297 bytes are wrong, the first at 100"):
        check_bytes(b"abc" * 33 + b"a?" + b"c" + b"abc" * 65, b"abc" * 99)


def test_output_of_a_probe_that_stopped_half_way() -> None:
    out = '{"begins": "copy forth"}\n{"step": "copy forth", "proven": true}\n{"begins": "write forth"}\n'
    assert read_proof(out, "it ended").because == {"write forth": "it ended"}
    assert read_proof("", "it ended").failed == "it ended"
    broken = '{"step": "copy forth", "proven": false, "because": "wrong"}\n{"failed": "no memory"}\n'
    assert read_proof(broken, "").because == {"copy forth": "wrong"}


def test_lines_of_others_in_a_probes_output_are_passed_over() -> None:
    out = 'a driver says\n3\n{"begins": "copy forth"}\n{"step": "copy forth", "proven": true}\n{"begi'
    assert read_proof(out, "it was ended") == Proof({"copy forth": True}, {})


def test_the_kernels_assemble(tmp_path: Path) -> None:
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("no PTX assembler here")
    (tmp_path / "kernels.ptx").write_text(PTX)
    for architecture in ("sm_75", "sm_90", "sm_120"):
        command = [ptxas, f"-arch={architecture}", "-o", str(tmp_path / "out"), str(tmp_path / "kernels.ptx")]
        subprocess.run(command, check=True)
