"""Moves bytes between two GPUs and checks every one: ``python -m ep2tp.doctor.probe BUS_ID BUS_ID``.

A process of its own, so that a hang of the driver can be ended. Prints one JSON object a line: ``{"begins": step}``
before a step, ``{"step": ..., "proven": true}`` or ``{..., "proven": false, "because": ...}`` after it; so the last
line names a step that never came back. A target that held the right bytes beforehand would prove nothing: each is
filled with other bytes, and seen to hold others, first.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from ctypes import c_uint, c_uint64
from functools import partial

from ep2tp.doctor.cuda import NATIVE_ATOMICS, CudaError, Device, Driver
from ep2tp.doctor.kernels import PTX

SIZE = 8 << 20
_THREADS, _BLOCKS, _TIMES = 128, 4, 500
_FILL = b"\xa5"

Tamper = Callable[[Device, int], None]


class Unproven(Exception):
    """What was moved is not what arrived."""


def check_bytes(found: bytes, expected: bytes) -> None:
    """Compare what arrived.

    Raises:
        Unproven: they differ; says how much and where first.
    """
    if found == expected:
        return
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    raise Unproven(f"{len(wrong)} of {len(expected)} bytes are wrong, the first at {wrong[0]}")


def _pattern(seed: int) -> bytes:
    return random.Random(seed).randbytes(SIZE)


class Probe:
    """Both directions between two GPUs.

    Args:
        tamper: called with the device and address of every target after a transfer; the tests corrupt a byte there.
    """

    def __init__(self, first: Device, second: Device, tamper: Tamper | None = None) -> None:
        self._devices = (first, second)
        self._tamper = tamper

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and action of each step; an action raises Unproven or CudaError where it fails.

        Atomics come last: tensor parallelism does without, so they must not keep the rest from being proven.
        """
        first, second = self._devices
        ways = ((first, second, "forth"), (second, first, "back"))
        for a, b, way in ways:
            yield f"copy {way}", partial(self._copy, a, b)
            if a.can_access(b):
                yield f"write {way}", partial(self._kernel, a, a, b)
                yield f"read {way}", partial(self._kernel, a, b, a)
        for a, b, way in ways:
            if a.can_access(b) and a.attribute(NATIVE_ATOMICS, b):
                yield f"atomics {way}", partial(self._atomics, a, b)

    def _copy(self, a: Device, b: Device) -> None:
        """The copy engine of ``a`` moves a pattern to ``b``, directly where the driver offers that."""
        if a.can_access(b):
            a.enable(b)
        expected, source, target = self._prepare(a, b)
        a.copy_to(b, target, source, SIZE)
        self._check(b, target, expected)

    def _kernel(self, runs_on: Device, source_on: Device, target_on: Device) -> None:
        """A kernel loads from one GPU and stores to the other: what custom all-reduce kernels do."""
        expected, source, target = self._prepare(source_on, target_on)
        words = SIZE // 4
        kernel = runs_on.load(PTX)["copy_words"]
        runs_on.launch(kernel, words // 256, 256, c_uint64(target), c_uint64(source), c_uint(words))
        runs_on.wait()
        self._check(target_on, target, expected)

    def _atomics(self, a: Device, b: Device) -> None:
        """Both GPUs add to one counter in ``b`` at the same time: a lost addition means that they are not atomic."""
        counter = b.put(bytes(4))
        kernels = [(device, device.load(PTX)["add_one"]) for device in (a, b)]
        for device, kernel in kernels:
            device.launch(kernel, _BLOCKS, _THREADS, c_uint64(counter), c_uint(_TIMES))
        for device in (a, b):
            device.wait()
        self._tampered(b, counter)
        expected = 2 * _BLOCKS * _THREADS * _TIMES
        found = int.from_bytes(b.get(counter, 4), "little")
        if found != expected:
            raise Unproven(f"{found} of {expected} atomic additions arrived")

    def _prepare(self, source_on: Device, target_on: Device) -> tuple[bytes, int, int]:
        expected = _pattern(source_on.ordinal + 1)
        source, target = source_on.put(expected), target_on.put(_FILL * SIZE)
        if target_on.get(target, SIZE) == expected:
            raise Unproven("the target held the pattern before the transfer")
        return expected, source, target

    def _check(self, device: Device, target: int, expected: bytes) -> None:
        self._tampered(device, target)
        check_bytes(device.get(target, SIZE), expected)

    def _tampered(self, device: Device, target: int) -> None:
        if self._tamper is not None:
            self._tamper(device, target)


def run(probe: Probe) -> Iterator[dict[str, object]]:
    """Run all steps; yields what the module prints."""
    for step, act in probe.steps():
        yield {"begins": step}
        try:
            act()
        except Unproven as error:
            yield {"step": step, "proven": False, "because": str(error)}
        except CudaError as error:
            if error.is_lack:
                raise
            yield {"step": step, "proven": False, "because": str(error)}
            return  # the context may be beyond use
        else:
            yield {"step": step, "proven": True}


def main() -> None:
    """Probe the pair named on the command line."""
    try:
        driver = Driver()
        first, second = (driver.device(bus_id) for bus_id in sys.argv[1:3])
        for line in run(Probe(first, second)):
            print(json.dumps(line), flush=True)
    except CudaError as error:
        print(json.dumps({"failed": str(error)}), flush=True)


if __name__ == "__main__":
    main()
