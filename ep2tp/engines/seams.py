"""Seams: the few places where ep2tp touches an engine. Each is checked before anything is touched."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import wrapt

from ep2tp.errors import SeamError

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Seam:
    """One function of an engine that ep2tp wraps.

    Attributes:
        module: the module that defines it.
        attribute: its name in the module, such as ``EngineArgs.create_engine_config``.
        parameters: the names that its signature must begin with.
        purpose: what ep2tp does there.
        checked: engine versions on which it was seen to hold.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...]
    purpose: str
    checked: tuple[str, ...]

    def problem(self) -> str | None:
        """What no longer fits, in words, or None. Imports the module."""
        try:
            target: Any = importlib.import_module(self.module)
            for name in self.attribute.split("."):
                target = getattr(target, name)
            names = tuple(inspect.signature(target).parameters)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            return f"{self.module}.{self.attribute}: {error}"
        if names[: len(self.parameters)] != self.parameters:
            return f"{self.module}.{self.attribute}: parameters {names}, expected to begin with {self.parameters}"
        return None

    def wrap(self, wrapper: Wrapper) -> None:
        """Wrap the function now, or when its module is first imported. Wrapping twice is a no-op.

        An engine process that never imports the module is never touched and imports nothing because of it.
        """

        def install(module: Any) -> None:
            owner: Any = module
            *path, last = self.attribute.split(".")
            for name in path:
                owner = getattr(owner, name, None)
            if owner is None or not hasattr(owner, last) or isinstance(vars(owner).get(last), wrapt.FunctionWrapper):
                return  # a missing seam is reported by problem() before anything relies on it
            wrapt.wrap_function_wrapper(owner, last, wrapper)

        wrapt.register_post_import_hook(install, self.module)


def check(seams: Iterable[Seam], engine: str, version: str, strict: bool) -> list[str]:
    """Problems of all seams together; with ``strict`` they are an error.

    Raises:
        SeamError: ``strict`` (EP2TP_STRICT=1) and a seam does not hold.
    """
    problems = [problem for seam in seams if (problem := seam.problem())]
    if problems and strict:
        raise SeamError(f"{engine} {version} has changed where ep2tp touches it: " + "; ".join(problems))
    return problems
