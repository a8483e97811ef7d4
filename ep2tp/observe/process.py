"""A running process and its children: what their titles say, and which all-to-all libraries they have mapped.

Reads ``/proc/PID/cmdline``, ``stat`` and ``maps``; touches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ep2tp.errors import SourceError
from ep2tp.observe.evidence import DEP, Evidence, Reading, Strength
from ep2tp.observe.layouts import sglang_scheduler, vllm_worker
from ep2tp.observe.signs import tags
from ep2tp.rewrite.guard import mapped_libraries


def _engine_core(ranks: dict[str, int]) -> Reading:
    says = "vLLM's engine core" + (" of a data-parallel rank" if ranks else "")
    return Reading(says + "; its name tells no EP rank", strength=Strength.NOTE)


_TITLES = (
    (re.compile(r"^VLLM::EngineCore(?P<tags>(?:_[A-Z]+\d+)*)"), "vllm", _engine_core),
    (re.compile(r"^VLLM::Worker(?P<tags>(?:_[A-Z]+\d+)+)"), "vllm", vllm_worker),
    (re.compile(r"^sglang::scheduler(?P<tags>(?:_[A-Z]+\d+)+)"), "sglang", sglang_scheduler),
)
_MOST_PROCESSES = 1024


def read_process(pid: int, proc: Path = Path("/proc")) -> Iterator[Evidence]:
    """Evidence from a process and its descendants.

    Raises:
        SourceError: there is no such process, or this user may not look into it.
    """
    if not (proc / str(pid)).is_dir():
        raise SourceError(f"process {pid}: not running on this machine (or in another container)")
    denied = []
    found: dict[str, Evidence] = {}
    for member in _with_descendants(pid, proc):
        for piece in title_evidence(_title(proc / str(member))):
            found.setdefault(piece.reading.says, piece)
        try:
            libraries = mapped_libraries(str(proc / str(member) / "maps"))
        except PermissionError:
            denied.append(member)
            continue
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        for library in libraries:
            says = f"{Path(library).name} is mapped; engines may import it without using it"
            found.setdefault(says, Evidence(Reading(says, DEP, Strength.HINT), f"pid {member}: {library}"))
    if denied and not found:
        raise SourceError(f"process {pid}: its memory map may be read by its owner and by root only")
    yield from found.values()
    if not any(piece.reading.strength is Strength.HINT for piece in found.values()):
        says = "no library of DeepEP, NVSHMEM (beside PyTorch's own), NIXL-EP, MORI or pplx is mapped"
        yield Evidence(Reading(says, strength=Strength.NOTE), f"pid {pid} and its descendants")


def title_evidence(title: str) -> Iterator[Evidence]:
    """What a process title says: engines name their workers by their ranks."""
    for pattern, engine, read in _TITLES:
        if match := pattern.search(title):
            yield Evidence(read(tags(match["tags"])), f"process {match.group()}", None, engine)


def _title(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _with_descendants(pid: int, proc: Path) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    members = [pid]
    for member in members:  # grows while it is walked
        members += children.get(member, [])[: _MOST_PROCESSES - len(members)]
    return members


def _parent(process: Path) -> int | None:
    try:
        stat = (process / "stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything, parentheses too
