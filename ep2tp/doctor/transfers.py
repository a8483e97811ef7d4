"""P2P between each pair of GPUs: what the driver reports, and what the probe has proven."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ep2tp.doctor.finding import Finding, Level, of_each
from ep2tp.doctor.machine import Machine, Pair

CHECK = "P2P"
LIMIT_S = 45.0
_KILL_WAIT_S = 5.0
_TURN_OFF = (
    "until it is mended, start engines with NCCL_P2P_DISABLE=1 and --disable-custom-all-reduce; "
    "to mend it: ACS and IOMMU off (BIOS; iommu=pt), a newer driver, no ForceP2P where the chipset cannot do it"
)


@dataclass(frozen=True)
class Proof:
    """What came of probing one pair.

    Attributes:
        proven: whether each step that was tried moved the right bytes, by name (``copy forth``, ``atomics back``).
        because: why a step failed, by name.
        failed: why nothing could be probed; empty otherwise.
    """

    proven: dict[str, bool]
    because: dict[str, str]
    failed: str = ""

    @property
    def broken(self) -> list[str]:
        """Transfers that did not move the right bytes. Atomics are not among them: tensor parallelism does without."""
        return [step for step, proven in self.proven.items() if not proven and not step.startswith("atomics")]

    def has(self, kind: str) -> bool:
        """Whether ``write``, ``read`` or ``atomics`` was proven, in both directions."""
        return all(self.proven.get(f"{kind} {way}") for way in ("forth", "back"))


def prove(machine: Machine, limit_s: float = LIMIT_S) -> list[Proof]:
    """Probe every pair, one after the other (pairs share links), each in a process that is ended after ``limit_s``."""
    gpus = machine.gpus
    return [probe_pair(gpus[pair.a].bus_id, gpus[pair.b].bus_id, limit_s) for pair in machine.pairs]


def probe_pair(first: str, second: str, limit_s: float = LIMIT_S) -> Proof:
    """Probe the GPUs at two PCI addresses in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ep2tp.doctor.probe", first, second],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        out, errors = process.communicate(timeout=limit_s)
        ending = f"the probe ended with status {process.returncode}: {errors.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, ending = _what_it_said(process), f"no end after {limit_s:.0f} s"
    return read_proof(out, ending)


def _what_it_said(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=_KILL_WAIT_S)[0]
    except subprocess.TimeoutExpired as error:  # the driver holds on to it: it cannot be ended, and is left
        return (error.output or b"").decode(errors="replace")


def read_proof(out: str, ending: str) -> Proof:
    """A proof from the lines that the probe printed.

    Args:
        out: its output; a step that began and has no result is one that hung, or took the process with it.
        ending: how the process ended, in words.
    """
    proven, because, begun = dict[str, bool](), dict[str, str](), None
    for value in _objects(out):
        if "failed" in value:
            return Proof(proven, because) if because else Proof({}, {}, value["failed"])
        if "begins" in value:
            begun = value["begins"]
            continue
        begun = None
        proven[value["step"]] = value["proven"]
        if not value["proven"]:
            because[value["step"]] = value["because"]
    if begun is not None:
        proven[begun], because[begun] = False, ending
    return Proof(proven, because, "" if proven else ending)


def _objects(out: str) -> Iterator[dict[str, Any]]:
    """The JSON objects among some lines; the driver may print there, too, and a process that was ended, half a line."""
    for line in out.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


def check_transfers(machine: Machine, proofs: list[Proof]) -> Iterator[Finding]:
    """Findings on each pair; pairs with the same outcome share one."""
    found = [
        (f"{pair.a}-{pair.b}", finding)
        for pair, proof in zip(machine.pairs, proofs, strict=True)
        for finding in _of_pair(pair, proof, machine.is_all_nvlink)
    ]
    yield from of_each(found, "pair", len(machine.pairs))


def _of_pair(pair: Pair, proof: Proof, is_nvlink: bool) -> Iterator[Finding]:
    reported = all(pair.reported.get(kind) == "ok" for kind in ("read", "write"))
    if proof.failed:
        yield Finding(CHECK, Level.UNCHECKED, f"the driver reports P2P {_words(pair)}; not proven: {proof.failed}")
    elif proof.broken:
        step = proof.broken[0]
        what = f"{step} fails: {proof.because.get(step, 'wrong bytes')} (the driver reports P2P {_words(pair)})"
        why = "NCCL and custom all-reduce trust the driver's report: an engine here hangs or computes garbage"
        yield Finding(CHECK, Level.BLOCKED, what, why, _TURN_OFF)
    elif proof.has("write") and proof.has("read"):
        yield Finding(CHECK, Level.OK, "P2P proven: copies, writes and reads in both directions, every byte checked")
        if not reported:
            what = f"NVML reports P2P {_words(pair)}, but it works"
            yield Finding(CHECK, Level.NOTE, what, "NCCL goes by what CUDA reports, which is that it works")
        yield _atomics(proof)
    else:
        level = Level.NOTE if is_nvlink else Level.DEGRADED
        what = f"no P2P ({_words(pair)}); copies through the host are proven"
        why = "GPUs exchange data through host memory: every all_reduce crosses PCIe twice"
        do = "on GeForce and some workstation boards a driver with P2P enabled (its ForceP2P options) or a PCIe switch"
        yield Finding(CHECK, level, what, why, do)


def _atomics(proof: Proof) -> Finding:
    why = "NVSHMEM and DeepEP need them; tensor parallelism does not"
    if proof.has("atomics"):
        return Finding(CHECK, Level.OK, "remote atomics proven: no addition of two GPUs to one counter was lost")
    if failed := [step for step in proof.because if step.startswith("atomics")]:
        what = f"the driver offers remote atomics, and {failed[0]} fails: {proof.because[failed[0]]}"
        return Finding(CHECK, Level.DEGRADED, what, why, "use no expert parallelism that needs NVSHMEM here")
    return Finding(CHECK, Level.NOTE, "no remote atomics between these GPUs, says the driver", why)


def _words(pair: Pair) -> str:
    return ", ".join(f"{kind} {pair.reported.get(kind, 'unknown')}" for kind in ("read", "write", "atomics"))
