"""Python files of published wheels, without downloading the wheels: pip reads single members by HTTP range requests.

vLLM's wheels are hundreds of MB, a module of it is some KB. pip's own index, mirrors and certificates are used, through
the parts of pip by which it reads a wheel's metadata (``--use-feature=fast-deps``). What was read is kept in
``.wheel-sources/``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

CACHE = Path(__file__).parents[2] / ".wheel-sources"


class NoIndexError(Exception):
    """There is no wheel to read: no network, or none for this platform."""


def module(package: str, version: str, name: str) -> ast.Module | None:
    """A module of a wheel, parsed; None where the wheel has no such module.

    Raises:
        NoIndexError: the wheel cannot be read.
    """
    target = CACHE / f"{package}-{version}" / f"{name}.py"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        found = target.with_suffix(".part")
        found.write_bytes(_read(package, version, name))
        found.replace(target)
    source = target.read_bytes()
    return ast.parse(source) if source else None


def parameters(tree: ast.Module, attribute: str) -> tuple[str, ...] | None:
    """The parameters of a function or method, without a class method's first; None where there is no such function."""
    body: list[ast.stmt] = tree.body
    found: ast.stmt | None = None
    for part in attribute.split("."):
        found = next((node for node in body if getattr(node, "name", None) == part), None)
        body = getattr(found, "body", [])
    if not isinstance(found, ast.FunctionDef):
        return None
    names = tuple(argument.arg for argument in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs))
    is_class_method = any(isinstance(d, ast.Name) and d.id == "classmethod" for d in found.decorator_list)
    return names[1:] if is_class_method else names


def imported_from(tree: ast.Module, name: str) -> str | None:
    """The module from which a module imports a name."""
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return next((node.module for node in imports if any(alias.name == name for alias in node.names)), None)


def _read(package: str, version: str, name: str) -> bytes:
    wheel = _wheel(package, version)
    paths = (name.replace(".", "/") + ".py", name.replace(".", "/") + "/__init__.py")
    with _index_errors(f"{package} {version}"):
        return next((wheel.read(path) for path in paths if path in wheel.NameToInfo), b"")


def newest(package: str) -> str:
    """The version of the newest release that has a wheel for this platform.

    Raises:
        NoIndexError: there is none that can be reached.
    """
    return str(_found(package, "")[0].version)


@cache
def _wheel(package: str, version: str) -> ZipFile:
    candidate, session = _found(package, f"=={version}")

    from pip._internal.network.lazy_wheel import LazyZipOverHTTP

    with _index_errors(f"{package} {version}"):
        return ZipFile(LazyZipOverHTTP(candidate.link.url_without_fragment, session))


@contextmanager
def _index_errors(what: str) -> Iterator[None]:
    from pip._internal.exceptions import NetworkConnectionError
    from pip._internal.network.lazy_wheel import HTTPRangeRequestUnsupported
    from pip._vendor.requests.exceptions import RequestException

    try:
        yield
    except (RequestException, NetworkConnectionError, HTTPRangeRequestUnsupported) as error:
        raise NoIndexError(f"{what}: {error}") from error


def _found(package: str, specifier: str) -> tuple[Any, Any]:
    """pip's best candidate for a requirement, and the HTTP session that reached the index."""
    with suppress(ImportError):
        import setuptools  # noqa: F401 - vLLM imports it, which fails once pip has imported Python's distutils

    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet

    command = create_command("download")
    options, _ = command.parse_args(["--only-binary=:all:", package])
    with _index_errors(f"{package}{specifier}"), command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate(package, SpecifierSet(specifier)).best_candidate
    if found is None:
        raise NoIndexError(f"no wheel of {package}{specifier} for this platform can be reached")
    return found, session
