"""Machines to examine: as NVML reports real ones of these kinds."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from ep2tp.doctor.machine import Gpu, Machine, Pair
from ep2tp.doctor.transfers import Proof

STEPS = [f"{kind} {way}" for way in ("forth", "back") for kind in ("copy", "write", "read", "atomics")]
PROVEN = Proof(dict.fromkeys(STEPS, True), {})
WITHOUT_ATOMICS = Proof({step: True for step in STEPS if "atomics" not in step}, {})
LOST_ATOMICS = Proof(PROVEN.proven | {"atomics forth": False}, {"atomics forth": "no end after 45 s"})
COPIES_ONLY = Proof({"copy forth": True, "copy back": True}, {})
BROKEN = Proof({"copy forth": True, "write forth": False}, {"write forth": "no end after 45 s"})


def machine(
    gpus: int, nvlink: bool = False, p2p: str = "ok", ancestor: str = "one host bridge", **changes: Any
) -> Machine:
    """``gpus`` RTX PRO 6000 with PCIe generation 5 x16; ``changes`` are made to the first."""
    common: dict[str, Any] = {
        "name": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "capability": "12.0",
        "memory": 96 << 30,
        "bar1": 128 << 30,
        "pcie_generation": 5,
        "pcie_generation_max": 5,
        "pcie_generation_gpu": 5,
        "pcie_width": 16,
        "pcie_width_max": 16,
    }
    cards = [Gpu(uuid=f"GPU-{i}", bus_id=f"0000:{i + 1:02x}:00.0", **common) for i in range(gpus)]
    if changes:
        cards[0] = Gpu(**{"uuid": "GPU-0", "bus_id": "0000:01:00.0", **common, **changes})
    reported = {"read": p2p, "write": p2p, "nvlink": "ok" if nvlink else "not supported", "atomics": p2p}
    pairs = [Pair(a, b, ancestor, dict(reported)) for a, b in combinations(range(gpus), 2)]
    return Machine("", "580.95.05", "13.0", tuple(cards), tuple(pairs))
