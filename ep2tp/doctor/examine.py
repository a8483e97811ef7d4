"""Runs every check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ep2tp.doctor.allreduce import check_all_reduce
from ep2tp.doctor.cache import proofs_of
from ep2tp.doctor.disk import check_disk
from ep2tp.doctor.engines import check_engines
from ep2tp.doctor.finding import Finding, Level
from ep2tp.doctor.gpus import check_gpus
from ep2tp.doctor.isolation import check_isolation
from ep2tp.doctor.libraries import check_libraries
from ep2tp.doctor.links import check_links
from ep2tp.doctor.machine import Machine
from ep2tp.doctor.surroundings import check_registry, check_shared_memory, check_variables
from ep2tp.doctor.transfers import CHECK as P2P
from ep2tp.doctor.transfers import check_transfers


def examine(machine: Machine, folder: Path | None, is_fresh: bool, root: Path = Path("/")) -> Iterator[Finding]:
    """All findings on a machine.

    Args:
        machine: its GPUs.
        folder: where a model lies, to measure the disk.
        is_fresh: probe P2P again, whatever the cache holds.
        root: where ``/sys`` and ``/proc`` are.
    """
    yield from check_gpus(machine, root)
    yield from check_links(machine)
    proofs, is_cached = proofs_of(machine, is_fresh)
    yield from check_transfers(machine, proofs)
    if is_cached and proofs:
        yield Finding(
            P2P, Level.NOTE, "P2P was probed earlier, with this driver and these GPUs", "", "--fresh probes again"
        )
    elif not machine.pairs:
        yield Finding(P2P, Level.UNCHECKED, "P2P: that takes two GPUs")
    yield from check_isolation(machine, root)
    yield from check_all_reduce(machine, proofs)
    yield from check_registry(root)
    yield from check_variables()
    yield from check_shared_memory(machine)
    yield from check_engines()
    yield from check_libraries()
    yield from check_disk(folder)
