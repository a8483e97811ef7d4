"""Which libraries for expert parallelism are installed: tensor parallelism needs none of them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder

from ep2tp.doctor.finding import Finding, Level
from ep2tp.rewrite.guard import GUARDED

CHECK = "all-to-all libraries"
_WHEELS = ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")


def check_libraries() -> Iterator[Finding]:
    """One finding; looks for packages without importing any."""
    modules = {name for name in GUARDED if "." not in name and PathFinder.find_spec(name) is not None}
    found = [*sorted(modules), *(f"{name} {version}" for name in _WHEELS if (version := _version(name)))]
    if not found:
        yield Finding(CHECK, Level.OK, "none installed, and none needed")
        return
    why = "not needed; in launches that ep2tp rewrites, importing one is refused (PyTorch brings NVSHMEM for itself)"
    yield Finding(CHECK, Level.NOTE if modules else Level.OK, f"installed: {', '.join(found)}", why)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
