"""What surrounds the engine's processes: the driver's registry options, NCCL's variables, shared memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ep2tp.doctor.finding import Finding, Level
from ep2tp.doctor.machine import Machine

CHECK = "surroundings"
_P2P_OPTIONS = ("ForceP2P", "RMForceP2PType", "RMPcieP2PType", "GrdmaPciTopoCheckOverride", "PeerMappingOverride")
_SLOWING = {
    "NCCL_P2P_DISABLE": "NCCL exchanges data through host memory",
    "NCCL_SHM_DISABLE": "NCCL may not use shared memory: what P2P cannot do goes through sockets",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
}
_SMALLEST_SHM = 1 << 30


def check_registry(root: Path) -> Iterator[Finding]:
    """P2P options in ``/proc/driver/nvidia/params``; none where there is no driver."""
    try:
        text = (root / "proc/driver/nvidia/params").read_text()
    except OSError:
        return
    match = re.search(r'^RegistryDwords: "(.*)"', text, re.MULTILINE)
    options = [
        word for word in re.split(r"[;,]\s*", match[1] if match else "") if word.partition("=")[0] in _P2P_OPTIONS
    ]
    if options:
        why = "the driver then reports P2P that it did not check; only proven P2P counts"
        yield Finding(CHECK, Level.NOTE, f"the driver is told to force P2P: {'; '.join(options)}", why)


def check_variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """NCCL's variables that are set, and whether one slows it down."""
    given = sorted(name for name in environment if name.startswith("NCCL_"))
    if given:
        yield Finding(CHECK, Level.NOTE, "set: " + ", ".join(f"{name}={environment[name]}" for name in given))
    for name, effect in _SLOWING.items():
        if environment.get(name, "0") != "0":
            yield Finding(
                CHECK, Level.DEGRADED, f"{name}={environment[name]}: {effect}", "", "unset it unless P2P is broken here"
            )


def check_shared_memory(machine: Machine, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """The size of ``/dev/shm``, over which NCCL and the engines' processes talk."""
    if len(machine.gpus) < 2:
        return
    try:
        room = os.statvfs(folder)
    except OSError as error:
        yield Finding(CHECK, Level.UNCHECKED, f"{folder}: {error}")
        return
    size = room.f_frsize * room.f_blocks
    if size < _SMALLEST_SHM:
        why = "NCCL without P2P, and the engines' own message queues, live there; they fail or hang when it is full"
        do = "in a container: --ipc=host or --shm-size=16g"
        yield Finding(CHECK, Level.DEGRADED, f"{folder} has {size / 1e6:.0f} MB", why, do)
    else:
        yield Finding(CHECK, Level.OK, f"{folder} has {size / 1e9:.1f} GB")
