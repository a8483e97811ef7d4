"""Keeps expert-parallel communication libraries from being imported while a rewrite is active.

Engines import some of them on sight, which maps NVSHMEM into the process. The guard sits in front of Python's own
finders; a guarded library that is not installed stays "not found", one that is installed is refused with an error that
names ep2tp. Engines treat that as "not available".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from ep2tp.errors import GuardError

GUARDED = (
    "deep_ep",
    "deep_ep_cpp",
    "hybrid_ep_cpp",
    "moonep",
    "mooncake.ep",
    "mooncake.mooncake_ep_buffer",
    "mori.ops",  # not mori.io, which moves KV caches between servers
    "mori.shmem",
    "nixl_ep",
    "nvshmem",
    "pplx_kernels",
    "uccl_ep",
)

# Not a user's setting: engines start their workers as child processes, which inherit it and arm their own guard
# before they import anything.
_MARK = "EP2TP_REWRITE_ACTIVE"


class GuardedLibraries(MetaPathFinder):
    """Refuses the guarded libraries."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Never finds anything; raises for a guarded library that could be imported.

        Raises:
            GuardError: ``fullname`` is guarded and installed.
        """
        if fullname in GUARDED and PathFinder.find_spec(fullname, path) is not None:
            raise GuardError(
                f"ep2tp keeps {fullname} from being imported: this launch was rewritten from expert to tensor "
                "parallelism and needs no all-to-all library. EP2TP=off runs the launch as given",
                name=fullname,
            )
        return None


def arm() -> list[str]:
    """Refuse guarded imports in this process and in its future children.

    Returns:
        Guarded libraries that this process had imported before; they stay.
    """
    os.environ[_MARK] = "1"
    if not is_armed():
        sys.meta_path.insert(0, GuardedLibraries())
    return [name for name in GUARDED if sys.modules.get(name) is not None]


def arm_if_inherited() -> None:
    """Arm in a child process of a rewritten launch; do nothing in any other."""
    if os.environ.get(_MARK):
        arm()


def disarm() -> None:
    """Let guarded libraries in again, in this process and its future children."""
    os.environ.pop(_MARK, None)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, GuardedLibraries)]


def is_armed() -> bool:
    """Whether this process refuses guarded imports."""
    return any(isinstance(finder, GuardedLibraries) for finder in sys.meta_path)


def mapped_libraries(maps: str = "/proc/self/maps") -> list[str]:
    """Shared libraries of DeepEP or NVSHMEM that are mapped into this process, by path (Linux).

    PyTorch's CUDA builds bring an NVSHMEM of their own and may map it without any expert parallelism; those paths end
    in ``torch/lib`` or lie in PyTorch's ``nvidia/nvshmem`` dependency and are left out.
    """
    with open(maps, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - a kernel file, not a path of ours
        paths = {line.split(maxsplit=5)[5].strip() for line in lines if line.count("/")}
    names = ("deep_ep", "nvshmem", "nixl_ep", "libmori", "pplx")
    own = ("/torch/lib/", "/nvidia/nvshmem/")
    return sorted(p for p in paths if any(n in p.lower() for n in names) and not any(o in p for o in own))
