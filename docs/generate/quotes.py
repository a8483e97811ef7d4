"""Finds quoted messages in Python source, where f-strings and ``%s`` have values and a quote has ``{}``."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SYMPTOMS = Path(__file__).with_name("symptoms.toml")


def groups() -> list[dict[str, Any]]:
    """The groups of ``symptoms.toml``."""
    found: list[dict[str, Any]] = tomllib.loads(SYMPTOMS.read_text(encoding="utf-8"))["group"]
    return found


def messages(tree: ast.Module) -> Iterator[str]:
    """Every string of a module, adjacent parts joined, with ``{}`` for what it fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _with_braces(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield _with_braces("".join(map(str, parts)))


def _with_braces(text: str) -> str:
    return re.sub(r"%(s|d|\.\d+f)", "{}", text)


def says(tree: ast.Module, quote: str) -> bool:
    """Whether a module has a string that contains ``quote``."""
    return any(quote in message for message in messages(tree))
