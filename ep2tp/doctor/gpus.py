"""Which GPUs there are, and whether they can carry even slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ep2tp.doctor.finding import Finding, Level
from ep2tp.doctor.machine import Machine

CHECK = "GPUs"
_NVIDIA = "0x10de"


def check_gpus(machine: Machine, root: Path) -> Iterator[Finding]:
    """Findings on GPUs, memory and driver; ``root`` is where ``/sys`` is."""
    if machine.problem:
        yield _no_driver(machine.problem, root)
        return
    if machine.hidden:
        why = f"an engine sees {len(machine.gpus)} GPUs, which may be fewer than were meant"
        yield Finding(CHECK, Level.DEGRADED, machine.hidden, why, "name each by a number or UUID of nvidia-smi -L")
    elif not machine.gpus:
        why = "engines run on the CPU only"
        yield Finding(CHECK, Level.DEGRADED, "the driver shows no GPU", why, "see CUDA_VISIBLE_DEVICES")
    if not machine.gpus:
        return
    kinds = Counter(f"{gpu.name} ({gpu.capability or '?'}, {_gib(gpu.memory)})" for gpu in machine.gpus)
    shown = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    yield Finding(CHECK, Level.OK, f"{shown}; driver {machine.driver}, CUDA {machine.cuda}")
    if len(kinds) > 1:
        why = "every rank gets an even slice, so the smallest and slowest GPU sets memory and speed for all"
        do = "serve on equal ones: CUDA_VISIBLE_DEVICES"
        yield Finding(CHECK, Level.DEGRADED, "the GPUs are of different kinds", why, do)
    count = len(machine.gpus)
    if count == 1:
        yield Finding(CHECK, Level.NOTE, "one GPU: it holds every expert whole under any plan")
    elif count & (count - 1):
        why = f"attention heads seldom divide by {count}, and ep2tp pads MLPs, not attention"
        do = f"ep2tp patches --model MODEL --tp {count}"
        yield Finding(CHECK, Level.NOTE, f"{count} GPUs, not a power of two", why, do)


def _no_driver(problem: str, root: Path) -> Finding:
    if _has_nvidia_device(root):
        what = f"an NVIDIA GPU is in this machine, but its driver does not answer: {problem}"
        do = "install or reload the driver; in a container, start it with --gpus all"
        return Finding(CHECK, Level.BLOCKED, what, "no engine can use it", do)
    why = "links, P2P and memory cannot be checked; engines run on the CPU only"
    return Finding(CHECK, Level.DEGRADED, f"no NVIDIA GPU here ({problem})", why, "run this on the machine that serves")


def _has_nvidia_device(root: Path) -> bool:
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor, kind = (_read(device / name) for name in ("vendor", "class"))
        if vendor == _NVIDIA and kind.startswith("0x03"):  # a display controller
            return True
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _gib(size: int | None) -> str:
    return "memory not told" if size is None else f"{size / 2**30:.0f} GiB"
