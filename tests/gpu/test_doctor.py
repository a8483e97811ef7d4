"""The doctor on real GPUs: its kernels on one, its proofs between two, and that a corrupted transfer is seen.

    python3 -m pytest tests/gpu/test_doctor.py -m gpu -s

With ``GPU_TEST_LOGS``, ``doctor.json`` and ``doctor.txt`` go to that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from ctypes import c_uint, c_uint64
from pathlib import Path

import pytest

from ep2tp.doctor.cuda import Device, Driver
from ep2tp.doctor.kernels import PTX
from ep2tp.doctor.probe import Probe, check_bytes, run
from ep2tp.doctor.transfers import probe_pair

pytestmark = pytest.mark.gpu


def bus_ids() -> list[str]:
    """PCI addresses, as the kernel writes them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [line.strip().lower()[-12:] for line in out.splitlines() if line.count(":") == 2]


BUSES = bus_ids()
needs_one = pytest.mark.skipif(not BUSES, reason="needs a GPU")
needs_two = pytest.mark.skipif(len(BUSES) < 2, reason="needs two GPUs")


@needs_one
def test_the_kernels_compute_on_this_gpu() -> None:
    device = Driver().device(BUSES[0])
    kernels = device.load(PTX)
    data = os.urandom(1 << 20)
    source, target, counter = device.put(data), device.put(bytes(1 << 20)), device.put(bytes(4))
    words = len(data) // 4
    device.launch(kernels["copy_words"], words // 256, 256, c_uint64(target), c_uint64(source), c_uint(words))
    device.launch(kernels["add_one"], 4, 128, c_uint64(counter), c_uint(500))
    device.wait()
    check_bytes(device.get(target, len(data)), data)
    assert int.from_bytes(device.get(counter, 4), "little") == 4 * 128 * 500


@needs_two
def test_between_two_gpus_every_step_that_the_driver_offers_is_proven() -> None:
    proof = probe_pair(BUSES[0], BUSES[1])
    print(proof)
    assert not proof.failed
    assert all(proof.proven.values()), proof.because
    assert proof.proven["copy forth"]
    assert proof.proven["copy back"]


def flip_a_byte(device: Device, address: int) -> None:
    """Corrupt what arrived, in the target's own memory."""
    [byte] = device.get(address + 3, 1)
    device.driver("cuMemcpyHtoD_v2", address + 3, bytes([byte ^ 0x10]), 1)


@needs_two
def test_a_corrupted_transfer_is_reported_at_every_step() -> None:
    """The negative control: one byte changed after the transfer, before the check."""
    driver = Driver()
    pair = (driver.device(BUSES[0]), driver.device(BUSES[1]))
    results = [line for line in run(Probe(*pair, tamper=flip_a_byte)) if "step" in line]
    untouched = [line for line in run(Probe(*pair)) if "step" in line]
    assert [line["step"] for line in results] == [line["step"] for line in untouched]
    assert not any(line["proven"] for line in results)
    assert all(line["proven"] for line in untouched)
    for line in results:
        expected = "atomic additions arrived" if "atomics" in str(line["step"]) else "bytes are wrong, the first at 3"
        assert expected in str(line["because"])


@needs_one
def test_the_command(tmp_path: Path) -> None:
    for module in ("pynvml", "rich", "click", "wrapt"):
        pytest.importorskip(module)
    logs = Path(os.environ.get("GPU_TEST_LOGS", tmp_path))
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "120"}
    command = [sys.executable, "-m", "ep2tp", "doctor"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    (logs / "doctor.txt").write_text(shown.stdout + shown.stderr)
    print(shown.stdout)
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, check=False)
    (logs / "doctor.json").write_text(again.stdout)
    found = json.loads(again.stdout)
    assert again.returncode == shown.returncode == {"ready": 0, "degraded": 1, "blocked": 2}[found["verdict"]]
    machine = found["machine"]
    assert machine["driver"]
    assert [gpu["bus_id"] for gpu in machine["gpus"]] == BUSES
    assert len(machine["pairs"]) == len(BUSES) * (len(BUSES) - 1) // 2
    if machine["pairs"]:
        assert any("P2P was probed earlier" in finding["what"] for finding in found["findings"])
