"""Which libraries for expert parallelism are installed: tensor parallelism needs none of them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder

from ep2tp.doctor.finding import Finding, Level
from ep2tp.rewrite.guard import GUARDED

CHECK = "all-to-all libraries"
_SHARED = frozenset({"mooncake"})
"""Packages that also move KV caches between servers, and are mostly installed for that."""
_WHEELS = ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")


def check_libraries() -> Iterator[Finding]:
    """One finding; looks for packages without importing any."""
    packages = {name.partition(".")[0] for name in GUARDED} - _SHARED
    modules = {name for name in packages if is_installed(name)}
    found = [*sorted(modules), *(f"{name} {version}" for name in _WHEELS if (version := _version(name)))]
    if not found:
        yield Finding(CHECK, Level.OK, "none installed, and none needed")
        return
    why = "not needed; in launches that ep2tp rewrites, importing one is refused (PyTorch brings NVSHMEM for itself)"
    yield Finding(CHECK, Level.NOTE if modules else Level.OK, f"installed: {', '.join(found)}", why)


def is_installed(module: str) -> bool:
    """Whether a package is there, without importing it; a folder of that name without an ``__init__`` is none."""
    spec = PathFinder.find_spec(module)
    return spec is not None and spec.origin is not None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
