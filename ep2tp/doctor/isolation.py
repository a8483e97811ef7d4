"""ACS and IOMMU: settings of the chipset that send GPU-to-GPU traffic the long way round, or nowhere."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from ep2tp.doctor.finding import Finding, Level
from ep2tp.doctor.machine import Machine

CHECK = "ACS and IOMMU"
_EXTENDED, _ACS = 0x100, 0x0D
_REDIRECTS = 0x4 | 0x8 | 0x10  # P2P request redirect, completion redirect, upstream forwarding (PCIe 6.12.1.1)
_WHY = "GPU-to-GPU traffic over PCIe is sent up to the root complex; users report hangs (NVIDIA/nccl issues 1999, 2079)"


def check_isolation(machine: Machine, root: Path) -> Iterator[Finding]:
    """Findings for the bridges above the GPUs; ``root`` is where ``/sys`` and ``/proc`` are. None for a single GPU."""
    if len(machine.gpus) < 2:
        return
    yield _iommu(machine, root)
    yield from _acs(machine, root)


def _iommu(machine: Machine, root: Path) -> Finding:
    command = _words(root / "proc/cmdline")
    options = [word for word in command if word.partition("=")[0] in ("iommu", "intel_iommu", "amd_iommu")]
    shown = f" (kernel: {' '.join(options)})" if options else ""
    kinds = {kind for gpu in machine.gpus if (kind := _group_type(root, gpu.bus_id))}
    if not kinds:
        return Finding(CHECK, Level.OK, f"the GPUs are in no IOMMU group{shown}")
    if kinds == {"identity"}:
        return Finding(CHECK, Level.OK, f"the IOMMU passes the GPUs' addresses through{shown}")
    what = f"the IOMMU translates the GPUs' addresses: {', '.join(sorted(kinds))}{shown}"
    level = Level.NOTE if machine.is_all_nvlink else Level.DEGRADED
    return Finding(
        CHECK, level, what, _WHY, "add iommu=pt to the kernel's command line, or turn the IOMMU off in the BIOS"
    )


def _acs(machine: Machine, root: Path) -> Iterator[Finding]:
    bridges = {bridge for gpu in machine.gpus for bridge in bridges_above(root, gpu.bus_id)}
    states = {bridge.name: redirects(bridge) for bridge in bridges}
    redirecting = sorted(name for name, state in states.items() if state)
    if redirecting:
        level = Level.NOTE if machine.is_all_nvlink else Level.DEGRADED
        do = "turn ACS off in the BIOS, or as root: setpci -s BRIDGE ECAP_ACS+0x6.w=0000 (until the next boot)"
        yield Finding(CHECK, level, f"ACS redirects P2P at {', '.join(redirecting)}", _WHY, do)
    elif None in states.values():
        what = "ACS of the bridges above the GPUs: their whole configuration space may be read by root only"
        yield Finding(CHECK, Level.UNCHECKED, what, "ACS can stop P2P over PCIe", "sudo ep2tp doctor")
    elif states:
        yield Finding(CHECK, Level.OK, f"no ACS redirection at the {len(states)} bridges above the GPUs")
    else:
        yield Finding(CHECK, Level.UNCHECKED, "no PCI bridges above the GPUs are visible here: a virtual machine")


def bridges_above(root: Path, bus_id: str) -> list[Path]:
    """The PCI bridges between a device and its root complex, as folders of ``/sys``."""
    device = (root / "sys/bus/pci/devices" / bus_id).resolve()
    return [folder for folder in device.parents if folder.name.count(":") == 2 and (folder / "config").exists()]


def redirects(device: Path) -> bool | None:
    """Whether a bridge's ACS control register redirects P2P; None where this user may not read it."""
    try:
        config = (device / "config").read_bytes()
    except OSError:
        return None
    if len(config) <= _EXTENDED:
        return None
    at, seen = _EXTENDED, set()
    while at and at not in seen and at + 8 <= len(config):
        seen.add(at)
        header, control = struct.unpack_from("<I", config, at)[0], struct.unpack_from("<H", config, at + 6)[0]
        if header & 0xFFFF == _ACS:
            return bool(control & _REDIRECTS)
        at = header >> 20
    return False


def _group_type(root: Path, bus_id: str) -> str:
    try:
        return (root / "sys/bus/pci/devices" / bus_id / "iommu_group/type").read_text().strip()
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
