"""Each check on machines as NVML reports them, and on trees of ``/sys`` and ``/proc`` as Linux shows them."""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ep2tp.doctor.allreduce import check_all_reduce
from ep2tp.doctor.disk import check_disk, read_speed
from ep2tp.doctor.engines import check_engines
from ep2tp.doctor.finding import Finding, Level, exit_code
from ep2tp.doctor.gpus import check_gpus
from ep2tp.doctor.isolation import bridges_above, check_isolation, redirects
from ep2tp.doctor.libraries import check_libraries
from ep2tp.doctor.links import check_links
from ep2tp.doctor.machine import Machine, read_machine
from ep2tp.doctor.surroundings import check_registry, check_shared_memory, check_variables
from ep2tp.doctor.transfers import Proof, check_transfers
from tests.checkpoint.other_user import as_nobody, open_folder
from tests.doctor.machines import BROKEN, COPIES_ONLY, LOST_ATOMICS, PROVEN, WITHOUT_ATOMICS, machine


def levels(findings: Any) -> list[Level]:
    return [finding.level for finding in findings]


def said(findings: Any) -> str:
    return "\n".join(f"{finding.level}: {finding.what}" for finding in findings)


def test_exit_codes() -> None:
    def one(level: Level) -> Finding:
        return Finding("c", level, "w")

    assert exit_code([one(Level.OK), one(Level.NOTE), one(Level.UNCHECKED)]) == 0
    assert exit_code([one(Level.OK), one(Level.DEGRADED)]) == 1
    assert exit_code([one(Level.BLOCKED), one(Level.DEGRADED)]) == 2
    assert exit_code([]) == 0


class TestGpus:
    def test_equal_ones(self, tmp_path: Path) -> None:
        [finding] = check_gpus(machine(4), tmp_path)
        assert finding.level is Level.OK
        assert "4 x NVIDIA RTX PRO 6000 Blackwell Server Edition (12.0, 96 GiB)" in finding.what

    def test_unequal_and_odd_ones(self, tmp_path: Path) -> None:
        found = list(check_gpus(machine(3, memory=24 << 30), tmp_path))
        assert levels(found) == [Level.OK, Level.DEGRADED, Level.NOTE]

    def test_a_gpu_without_its_driver_blocks(self, tmp_path: Path) -> None:
        no_driver = Machine(problem="Driver Not Loaded")
        assert levels(check_gpus(no_driver, tmp_path)) == [Level.DEGRADED]
        device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x10de\n")
        (device / "class").write_text("0x040300\n")  # the audio function of a GPU that is passed through elsewhere
        assert levels(check_gpus(no_driver, tmp_path)) == [Level.DEGRADED]
        (device / "class").write_text("0x030200\n")
        assert levels(check_gpus(no_driver, tmp_path)) == [Level.BLOCKED]

    def test_a_variable_that_names_no_gpu_is_not_the_drivers_fault(self, tmp_path: Path) -> None:
        hidden = "CUDA_VISIBLE_DEVICES=7: '7' does not name one of this machine's 2 GPUs"
        [finding] = check_gpus(Machine("", "580", "13.0", hidden=hidden), tmp_path)
        assert (finding.level, finding.what) == (Level.DEGRADED, hidden)
        found = list(check_gpus(replace(machine(2), hidden=hidden), tmp_path))
        assert levels(found) == [Level.DEGRADED, Level.OK]


class TestLinks:
    @pytest.mark.parametrize(
        ("changes", "level", "words"),
        [
            ({}, Level.OK, "generation 5 x16, the most there is"),
            ({"pcie_width": 8}, Level.DEGRADED, "PCIe x8, where x16 is possible"),
            ({"pcie_generation": 1}, Level.NOTE, "generation 1 now, 5 at most"),
            ({"pcie_generation": 4, "pcie_generation_max": 4}, Level.NOTE, "where the GPU could do 5"),
            ({"pcie_width": None}, Level.UNCHECKED, "does not tell"),
        ],
    )
    def test_pcie(self, changes: dict[str, int], level: Level, words: str) -> None:
        [*_, finding] = check_links(machine(1, **changes))
        assert finding.level is level
        assert words in finding.what

    def test_nvlink(self) -> None:
        assert "NVLink joins all 4 GPUs" in said(check_links(machine(4, nvlink=True)))
        assert "no NVLink between the 4 GPUs" in said(check_links(machine(4)))

    def test_sockets(self) -> None:
        found = list(check_links(machine(2, ancestor="across NUMA nodes")))
        assert found[1].level is Level.NOTE
        assert "across NUMA nodes: 1 of the pairs" in found[1].what


class TestP2P:
    @pytest.mark.parametrize(
        ("reported", "proof", "expected"),
        [
            ("ok", PROVEN, [Level.OK, Level.OK]),
            ("ok", WITHOUT_ATOMICS, [Level.OK, Level.NOTE]),
            ("ok", LOST_ATOMICS, [Level.OK, Level.DEGRADED]),
            ("ok", BROKEN, [Level.BLOCKED]),
            ("chipset not supported", COPIES_ONLY, [Level.DEGRADED]),
            ("chipset not supported", PROVEN, [Level.OK, Level.NOTE, Level.OK]),
            ("ok", Proof({}, {}, "libcuda.so.1 cannot be loaded"), [Level.UNCHECKED]),
        ],
    )
    def test_only_what_is_proven_counts(self, reported: str, proof: Proof, expected: list[Level]) -> None:
        assert levels(check_transfers(machine(2, p2p=reported), [proof])) == expected

    def test_the_broken_pair_is_named_with_what_to_do(self) -> None:
        found = list(check_transfers(machine(4), [PROVEN, PROVEN, PROVEN, PROVEN, BROKEN, PROVEN]))
        [blocked] = [finding for finding in found if finding.level is Level.BLOCKED]
        assert blocked.what.startswith("pair 1-3: write forth fails: no end after 45 s")
        assert "NCCL_P2P_DISABLE=1" in blocked.do
        assert any(finding.what.startswith("pairs 0-1, 0-2, 0-3, 1-2, 2-3: P2P proven") for finding in found)

    @pytest.mark.parametrize(
        ("gpus", "nvlink", "proof", "words"),
        [
            (2, False, PROVEN, "on in vLLM and SGLang for 2 GPUs"),
            (4, False, PROVEN, "4 GPUs without NVLink; NCCL is used"),
            (8, True, PROVEN, "on in vLLM and SGLang for 8 GPUs"),
            (3, True, PROVEN, "3 GPUs are not 2, 4, 6 or 8"),
            (2, False, BROKEN, "must be off here"),
            (2, False, COPIES_ONLY, "no P2P; NCCL is used"),
        ],
    )
    def test_custom_all_reduce(self, gpus: int, nvlink: bool, proof: Proof, words: str) -> None:
        subject = machine(gpus, nvlink)
        [finding] = check_all_reduce(subject, [proof] * len(subject.pairs))
        assert words in finding.what


def config_space(acs_control: int | None) -> bytes:
    """4 KiB of PCIe configuration space: an AER capability at 0x100, and ACS at 0x148."""
    config = bytearray(4096)
    struct.pack_into("<I", config, 0x100, 0x0001 | 1 << 16 | 0x148 << 20)
    struct.pack_into("<I", config, 0x148, (0x000D if acs_control is not None else 0x0003) | 1 << 16)
    struct.pack_into("<H", config, 0x148 + 6, acs_control or 0)
    return bytes(config)


def sys_tree(root: Path, acs_control: int | None = None, iommu: str | None = None, size: int = 4096) -> None:
    """Two GPUs below a switch: a port of the root complex, the switch's upstream port, a downstream port for each."""
    devices = root / "sys/bus/pci/devices"
    devices.mkdir(parents=True)
    top = root / "sys/devices/pci0000:00/0000:00:01.0/0000:10:00.0"
    for i in (1, 2):
        gpu = top / f"0000:11:0{i}.0" / f"0000:0{i}:00.0"
        gpu.mkdir(parents=True)
        (devices / gpu.name).symlink_to(gpu)
        if iommu is not None:
            (gpu / "iommu_group").mkdir()
            (gpu / "iommu_group" / "type").write_text(f"{iommu}\n")
        for folder in (gpu, *gpu.parents[:3]):
            (folder / "config").write_bytes(config_space(acs_control)[:size])
    (root / "proc").mkdir()
    (root / "proc/cmdline").write_text("BOOT_IMAGE=/vmlinuz root=/dev/sda1 amd_iommu=on quiet\n")


class TestIsolation:
    def test_the_bridges_are_those_above_the_gpu(self, tmp_path: Path) -> None:
        sys_tree(tmp_path)
        assert [bridge.name for bridge in bridges_above(tmp_path, "0000:01:00.0")] == [
            "0000:11:01.0",
            "0000:10:00.0",
            "0000:00:01.0",
        ]

    @pytest.mark.parametrize(
        ("control", "redirecting"), [(0x1D, True), (0x04, True), (0x01, False), (0x00, False), (None, False)]
    )
    def test_acs(self, tmp_path: Path, control: int | None, redirecting: bool) -> None:
        sys_tree(tmp_path, control)
        assert redirects(tmp_path / "sys/devices/pci0000:00/0000:00:01.0") is redirecting
        findings = list(check_isolation(machine(2), tmp_path))
        assert (Level.DEGRADED in levels(findings)) is redirecting
        if redirecting:
            assert "0000:00:01.0, 0000:10:00.0, 0000:11:01.0, 0000:11:02.0" in findings[-1].what

    def test_without_root_acs_is_not_checked(self, tmp_path: Path) -> None:
        sys_tree(tmp_path, 0x1D, size=64)
        assert levels(check_isolation(machine(2), tmp_path)) == [Level.OK, Level.UNCHECKED]

    @pytest.mark.parametrize(
        ("kind", "level"),
        [("DMA-FQ", Level.DEGRADED), ("DMA", Level.DEGRADED), ("identity", Level.OK), (None, Level.OK)],
    )
    def test_iommu(self, tmp_path: Path, kind: str | None, level: Level) -> None:
        sys_tree(tmp_path, iommu=kind)
        first, *_ = check_isolation(machine(2), tmp_path)
        assert first.level is level
        assert "kernel: amd_iommu=on" in first.what

    def test_nvlink_does_not_care(self, tmp_path: Path) -> None:
        sys_tree(tmp_path, 0x1D, "DMA")
        assert exit_code(check_isolation(machine(2, nvlink=True), tmp_path)) == 0

    def test_a_loop_in_a_broken_configuration_space_ends(self, tmp_path: Path) -> None:
        config = bytearray(4096)
        struct.pack_into("<I", config, 0x100, 0x0003 | 0x100 << 20)
        (tmp_path / "config").write_bytes(config)
        assert redirects(tmp_path) is False


class TestSurroundings:
    def test_forced_p2p_is_named(self, tmp_path: Path) -> None:
        folder = tmp_path / "proc/driver/nvidia"
        folder.mkdir(parents=True)
        text = 'ResmanDebugLevel: 4294967295\nRegistryDwords: "%s"\nRegistryDwordsPerDevice: ""\n'
        (folder / "params").write_text(text % "")
        assert not list(check_registry(tmp_path))
        (folder / "params").write_text(text % "ForceP2P=0x11;RMForceP2PType=1;EnableResizableBar=1")
        [finding] = check_registry(tmp_path)
        assert finding.what.endswith("ForceP2P=0x11; RMForceP2PType=1")

    def test_variables(self) -> None:
        assert not list(check_variables({"PATH": "/bin"}))
        assert levels(check_variables({"NCCL_DEBUG": "INFO"})) == [Level.NOTE]
        assert levels(check_variables({"NCCL_P2P_DISABLE": "1"})) == [Level.NOTE, Level.DEGRADED]
        assert levels(check_variables({"NCCL_P2P_DISABLE": "0"})) == [Level.NOTE]

    def test_shared_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not list(check_shared_memory(machine(1), tmp_path))
        assert levels(check_shared_memory(machine(2), tmp_path / "missing")) == [Level.UNCHECKED]
        for blocks, level in ((64 << 8, Level.DEGRADED), (64 << 18, Level.OK)):
            monkeypatch.setattr(os, "statvfs", lambda _, n=blocks: SimpleNamespace(f_frsize=4096, f_blocks=n))
            assert levels(check_shared_memory(machine(2), tmp_path)) == [level]


class TestSoftware:
    def test_engines_are_found_imported_and_their_seams_checked(self, tmp_path: Path, monkeypatch: Any) -> None:
        package = tmp_path / "vllm"
        package.mkdir()
        self._only(monkeypatch, tmp_path)
        assert levels(check_engines()) == [Level.DEGRADED]  # a folder of that name is no engine
        (package / "__init__.py").write_text("raise RuntimeError('libcudart.so.13: cannot open')")
        [broken] = check_engines()
        assert broken.level is Level.BLOCKED
        assert "RuntimeError: libcudart.so.13: cannot open" in broken.what
        (package / "__init__.py").write_text("import time; time.sleep(60)")
        [slow] = check_engines(limit_s=3.0)
        assert slow.level is Level.BLOCKED
        assert "over 3 s" in slow.what
        (package / "__init__.py").write_text("__version__ = '9.9.0'")
        [changed] = check_engines()
        assert changed.level is Level.DEGRADED
        assert "vllm.entrypoints" in changed.what

    def test_an_engine_whose_check_breaks_off_does_not_hide_the_other(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("ep2tp.doctor.engines.is_installed", lambda name: True)
        answers = iter(["no JSON\n", '{"version": "9.9", "problem": null}\n'])
        run = SimpleNamespace(returncode=0, stderr="")
        monkeypatch.setattr(
            "subprocess.run", lambda *words, **options: SimpleNamespace(**vars(run), stdout=next(answers))
        )
        first, second = check_engines()
        assert first.level is Level.UNCHECKED
        assert first.what.startswith("the check of vLLM broke off: JSONDecodeError: ")
        assert second.what.startswith("SGLang 9.9: a version that ep2tp knows")

    @pytest.mark.engine
    def test_the_installed_engines_seams_hold(self) -> None:
        pytest.importorskip("vllm")
        assert any(f.level is Level.OK and f.what.startswith("vLLM 0.") for f in check_engines())

    @staticmethod
    def _only(monkeypatch: Any, folder: Path) -> None:
        """Find packages in ``folder`` alone; children find it first."""
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parents[2])]))
        monkeypatch.setattr(sys, "path", [str(folder)])

    def test_libraries(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        assert levels(check_libraries()) == [Level.OK]
        (tmp_path / "deep_ep").mkdir()
        (tmp_path / "deep_ep" / "__init__.py").write_text("raise SystemExit('imported')")
        [finding] = check_libraries()
        assert finding.level is Level.NOTE
        assert "deep_ep" in finding.what


class TestDisk:
    def test_the_largest_file_is_read_and_its_bytes_counted(self, tmp_path: Path) -> None:
        (tmp_path / "small").write_bytes(b"x")
        assert levels(check_disk(tmp_path)) == [Level.UNCHECKED]
        large = tmp_path / "snapshots" / "model.safetensors"
        large.parent.mkdir()
        large.write_bytes(os.urandom(1 << 20) * 70)
        [finding] = check_disk(tmp_path)
        assert finding.what.startswith("model.safetensors reads at ")
        assert read_speed(large).bytes_per_second > 1e6
        assert levels(check_disk(None)) == [Level.UNCHECKED]

    def test_a_limit_ends_the_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "large").write_bytes(bytes(96 << 20))
        reads = []
        real = os.readv
        monkeypatch.setattr(os, "readv", lambda fd, buffers: reads.append(fd) or real(fd, buffers))
        read_speed(tmp_path / "large", limit_bytes=32 << 20)
        assert len(reads) == 2

    def test_a_file_that_may_not_be_read_is_a_finding_that_says_so(self) -> None:
        with open_folder() as folder:
            (folder / "large").write_bytes(bytes(64 << 20))
            (folder / "large").chmod(0)
            with as_nobody():
                [finding] = check_disk(folder)
        assert finding.level is Level.UNCHECKED
        assert f"{folder / 'large'} cannot be read (Permission denied)" in finding.what

    def test_a_link_into_a_closed_folder_hides_that_file_alone(self) -> None:
        with open_folder() as folder:
            (folder / "blobs").mkdir()
            (folder / "blobs" / "hidden").write_bytes(bytes(96 << 20))
            (folder / "model.safetensors").symlink_to(folder / "blobs" / "hidden")
            (folder / "blobs").chmod(0)
            with as_nobody():
                [alone] = check_disk(folder)
            (folder / "open").write_bytes(bytes(64 << 20))
            with as_nobody():
                [beside] = check_disk(folder)
            (folder / "blobs").chmod(0o755)
        assert alone.level is Level.UNCHECKED
        assert "cannot be read (Permission denied)" in alone.what
        assert beside.what.startswith("open reads at ")

    def test_a_link_that_leads_nowhere_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
        [finding] = check_disk(tmp_path)
        assert f"{tmp_path / 'model.safetensors'} cannot be read (No such file" in finding.what


def test_nvml_is_asked_for_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for NVML: handles are numbers; the second GPU tells nothing of its PCIe link."""

    class NVMLError(Exception):
        pass

    def only_first(value: int) -> Any:
        def ask(handle: int) -> int:
            if handle:
                raise NVMLError("Not Supported")
            return value

        return ask

    memory = SimpleNamespace(total=80 << 30, bar1Total=128 << 30)
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlSystemGetDriverVersion=lambda: b"580.95.05",
        nvmlSystemGetCudaDriverVersion=lambda: 13010,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetName=lambda handle: "NVIDIA H100 PCIe",
        nvmlDeviceGetPciInfo=lambda handle: SimpleNamespace(busId=f"0000000{handle}:4{handle}:00.0".upper()),
        nvmlDeviceGetMemoryInfo=lambda handle: memory,
        nvmlDeviceGetBAR1MemoryInfo=lambda handle: memory,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetCurrPcieLinkGeneration=only_first(4),
        nvmlDeviceGetMaxPcieLinkGeneration=only_first(5),
        nvmlDeviceGetGpuMaxPcieLinkGeneration=only_first(5),
        nvmlDeviceGetCurrPcieLinkWidth=only_first(16),
        nvmlDeviceGetMaxPcieLinkWidth=only_first(16),
        nvmlDeviceGetTopologyCommonAncestor=lambda a, b: 30,
        nvmlDeviceGetP2PStatus=lambda a, b, index: {0: 0, 1: 0, 2: 5, 3: 1}[index],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    found = read_machine()
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-0", "GPU-2"]
    assert found.gpus[1].bus_id == "0002:42:00.0"
    assert (found.driver, found.cuda) == ("580.95.05", "13.1")
    assert (found.gpus[0].pcie_generation, found.gpus[1].pcie_generation) == (4, None)
    [pair] = found.pairs
    assert pair.ancestor == "one host bridge"
    reported = {"read": "ok", "write": "ok", "nvlink": "not supported", "atomics": "chipset not supported"}
    assert pair.reported == reported
    assert Machine.from_json(found.as_json()) == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert read_machine() == Machine("", "580.95.05", "13.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    found = read_machine()
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-2"]
    assert found.hidden.startswith("CUDA_VISIBLE_DEVICES=2,3: '3' does not name one")


def test_nvml_that_breaks_is_a_machine_whose_gpus_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=init, NVMLError=OSError))
    assert "invalid start byte" in read_machine().problem
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert "pynvml" in read_machine().problem
