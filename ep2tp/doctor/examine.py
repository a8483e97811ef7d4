"""Runs every check, each apart from the others: one that breaks is a finding, and loses nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ep2tp.doctor import allreduce, disk, engines, gpus, isolation, libraries, links, surroundings
from ep2tp.doctor.allreduce import check_all_reduce
from ep2tp.doctor.cache import proofs_of
from ep2tp.doctor.disk import check_disk
from ep2tp.doctor.engines import check_engines
from ep2tp.doctor.finding import Finding, Level, in_words, isolated
from ep2tp.doctor.gpus import check_gpus
from ep2tp.doctor.isolation import check_isolation
from ep2tp.doctor.libraries import check_libraries
from ep2tp.doctor.links import check_links
from ep2tp.doctor.machine import Machine
from ep2tp.doctor.surroundings import check_registry, check_shared_memory, check_variables
from ep2tp.doctor.transfers import CHECK as P2P
from ep2tp.doctor.transfers import Proof, check_transfers


def examine(machine: Machine, folder: Path | None, is_fresh: bool, root: Path = Path("/")) -> Iterator[Finding]:
    """All findings on a machine.

    Args:
        machine: its GPUs.
        folder: where a model lies, to measure the disk.
        is_fresh: probe P2P again, whatever the cache holds.
        root: where ``/sys`` and ``/proc`` are.
    """
    yield from isolated(gpus.CHECK, lambda: check_gpus(machine, root))
    yield from isolated(links.CHECK, lambda: check_links(machine))
    proofs, is_cached = _proofs(machine, is_fresh)
    yield from isolated(P2P, lambda: check_transfers(machine, proofs))
    if is_cached and proofs:
        yield Finding(
            P2P, Level.NOTE, "P2P was probed earlier, with this driver and these GPUs", "", "--fresh probes again"
        )
    elif not machine.pairs:
        yield Finding(P2P, Level.UNCHECKED, "P2P: that takes two GPUs")
    yield from isolated(isolation.CHECK, lambda: check_isolation(machine, root))
    yield from isolated(allreduce.CHECK, lambda: check_all_reduce(machine, proofs))
    yield from isolated(surroundings.CHECK, lambda: check_registry(root))
    yield from isolated(surroundings.CHECK, check_variables)
    yield from isolated(surroundings.CHECK, lambda: check_shared_memory(machine))
    yield from isolated(engines.CHECK, check_engines)
    yield from isolated(libraries.CHECK, check_libraries)
    yield from isolated(disk.CHECK, lambda: check_disk(folder))


def _proofs(machine: Machine, is_fresh: bool) -> tuple[list[Proof], bool]:
    """As :func:`proofs_of`; where that breaks, each pair is one that could not be probed."""
    try:
        return proofs_of(machine, is_fresh)
    except Exception as error:  # as in isolated
        return [Proof({}, {}, in_words(error)) for _ in machine.pairs], False
