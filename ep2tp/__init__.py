"""Tensor-parallel slices in place of whole experts: MoE models on GPUs without NVLink."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "reshard", "verify"]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first used: engines import this package in every process."""
    if name == "reshard":
        from ep2tp.checkpoint.reshard import reshard

        return reshard
    if name == "verify":
        from ep2tp.checkpoint.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
