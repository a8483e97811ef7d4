"""Stands in for SGLang's CUDA kernels: every name can be imported, and raises when it is called."""

from typing import Any

__version__ = "0.4.10"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: no CUDA kernels in this environment")

    missing.__name__ = name
    return missing
