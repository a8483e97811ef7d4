"""The messages that the troubleshooting page quotes are in the source of the versions that it names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.generate.quotes import groups, says
from tests.engines import wheel_sources
from tests.engines.wheel_sources import NoIndexError

OWN = Path(__file__).parents[2]


def places() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(engine, version, module, quotes) of every place that ``symptoms.toml`` names."""
    for group in groups():
        for symptom in group["symptom"]:
            for place in symptom.get("found", ()):
                quotes = symptom["quotes"] if "quote" not in place else [symptom["quotes"][place["quote"]]]
                for version in place.get("versions", ["here"]):
                    yield place["engine"], version, place["module"], tuple(quotes)


def source(engine: str, version: str, module: str) -> ast.Module | None:
    if engine == "ep2tp":
        return ast.parse((OWN / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    try:
        return wheel_sources.module(engine, version, module)
    except NoIndexError as error:
        pytest.skip(f"needs a package index: {error}")


@pytest.mark.parametrize(("engine", "version", "module", "quotes"), list(places()))
def test_a_quote_is_in_the_source(engine: str, version: str, module: str, quotes: tuple[str, ...]) -> None:
    tree = source(engine, version, module)
    assert tree is not None, f"{engine} {version} has no {module}"
    assert [quote for quote in quotes if not says(tree, quote)] == []


def test_a_quote_matches_what_a_message_fills_in_and_nothing_else() -> None:
    tree = ast.parse('raise ValueError(f"size {size} is not" " divisible by %d." % block)')
    assert says(tree, "size {} is not divisible by {}.")
    assert not says(tree, "size {} is divisible by {}.")
    assert not says(tree, "size {} is not divisible by 128.")


def test_every_quote_is_looked_up_somewhere() -> None:
    for group in groups():
        for symptom in group["symptom"]:
            assert symptom.get("found") or not symptom.get("quotes"), symptom["quotes"]
