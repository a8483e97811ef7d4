"""Seams: the few places where ep2tp touches an engine. Each is checked before anything is touched."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
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

    def is_wrapped(self, wrapper: Wrapper) -> bool:
        """Whether ``wrapper`` is around the function, where its module is imported."""
        owner: Any = sys.modules.get(self.module)
        *path, last = self.attribute.split(".")
        for name in path:
            owner = getattr(owner, name, None)
        return owner is not None and _is_wrapped_by(wrapper, vars(owner).get(last))

    def wrap(self, wrapper: Wrapper) -> None:
        """Wrap the function now, or when its module is first imported. Wrapping twice is a no-op.

        An engine process that never imports the module is never touched and imports nothing because of it.
        """

        def install(module: Any) -> None:
            owner: Any = module
            *path, last = self.attribute.split(".")
            for name in path:
                owner = getattr(owner, name, None)
            if owner is None or not hasattr(owner, last) or _is_wrapped_by(wrapper, vars(owner).get(last)):
                return  # a missing seam is reported by problem() before anything relies on it
            wrapt.wrap_function_wrapper(owner, last, wrapper)

        wrapt.register_post_import_hook(install, self.module)


def _is_wrapped_by(wrapper: Wrapper, function: Any) -> bool:
    """Whether ``wrapper`` is among the wrappers of a function; others may have wrapped it before or since."""
    while function is not None:
        if isinstance(function, wrapt.FunctionWrapper) and function._self_wrapper is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def problem(
    engine: str,
    version: str,
    checked: tuple[str, ...],
    seams: Iterable[Seam],
    strict: bool,
    insists: bool,
    parts: int = 2,
) -> str | None:
    """Why an engine is left alone, or None where its version is known and all seams hold.

    Args:
        engine: its name.
        version: the installed version.
        checked: versions that ep2tp was checked with, oldest first; those of their range of releases are known.
        seams: what ep2tp wraps.
        strict: raise instead (EP2TP_STRICT=1).
        insists: whether the user wants ep2tp on an unknown version too (EP2TP=on); seams have to hold in any case.
        parts: numbers of a version that name a release of the engine: 2 of vLLM's 0.32.0, 3 of SGLang's 0.5.23.

    Raises:
        SeamError: ``strict``, and there is a problem.
    """
    found = "; ".join(p for seam in seams if (p := seam.problem()))
    if found:
        found = f"{engine} {version} has changed where ep2tp touches it: {found}"
    elif not insists and not release(checked[0], parts) <= release(version, parts) <= release(checked[-1], parts):
        known = f"{checked[0]} to {checked[-1]}"
        found = f"ep2tp knows {engine} {known}, not {version}; EP2TP=on uses ep2tp all the same"
    if found and strict:
        raise SeamError(found)
    return found or None


def release(version: str, parts: int) -> tuple[int, ...]:
    """The first numbers of a version; none of one that has no numbers, such as a source build's ``dev``."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:parts])
