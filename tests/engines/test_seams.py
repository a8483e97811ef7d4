"""What happens when an engine is not the one that ep2tp knows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ep2tp.engines import seams as engine_seams
from ep2tp.engines.seams import Seam
from ep2tp.errors import SeamError

KNOWN = ("1.2.0", "2.0.1")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("some_engine")
    exec("class Loader:\n    def load(self, config, model):\n        return [config, model]\n", vars(module))
    monkeypatch.setitem(sys.modules, "some_engine", module)
    return module


def seam(attribute: str = "Loader.load", parameters: tuple[str, ...] = ("self", "config")) -> Seam:
    return Seam("some_engine", attribute, parameters, "for this test", ("1.0",))


def test_a_seam_that_holds_has_no_problem(engine: ModuleType) -> None:
    assert seam().problem() is None


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (seam("Loader.load_all"), "load_all"),
        (seam(parameters=("self", "model")), r"parameters \('self', 'config', 'model'\)"),
        (Seam("no_engine_here", "load", (), "", ()), "no_engine_here"),
    ],
)
def test_a_changed_seam_is_named(engine: ModuleType, changed: Seam, problem: str) -> None:
    found = engine_seams.problem("some engine", "2.0", KNOWN, [seam(), changed], strict=False, insists=True)
    assert found is not None
    assert found.count("some_engine.") + found.count("no_engine_here.") == 1
    with pytest.raises(SeamError, match=f"some engine 2.0 has changed.*{problem}"):
        engine_seams.problem("some engine", "2.0", KNOWN, [changed], strict=True, insists=True)


@pytest.mark.parametrize(
    ("version", "is_known"),
    [
        ("1.2", True),
        ("1.2.5", True),
        ("1.9", True),
        ("2.0.3+cu130", True),
        ("2.1", False),
        ("1.1", False),
        ("dev", False),
    ],
)
def test_versions_outside_the_checked_range_are_left_alone_unless_the_user_insists(
    engine: ModuleType, version: str, is_known: bool
) -> None:
    found = engine_seams.problem("some engine", version, KNOWN, [seam()], strict=False, insists=False)
    assert (found is None) is is_known
    assert engine_seams.problem("some engine", version, KNOWN, [seam()], strict=False, insists=True) is None
    if not is_known:
        with pytest.raises(SeamError, match=r"ep2tp knows some engine 1.2.0 to 2.0.1, not .* EP2TP=on"):
            engine_seams.problem("some engine", version, KNOWN, [seam()], strict=True, insists=False)


def test_wrapping_twice_wraps_once(engine: Any) -> None:
    calls = []

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append(args)
        return wrapped(*args, **kwargs)

    seam().wrap(wrapper)
    seam().wrap(wrapper)
    assert engine.Loader().load("c", "m") == ["c", "m"]
    assert calls == [("c", "m")]


def test_a_function_that_someone_else_wrapped_is_wrapped_too(engine: Any) -> None:
    def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return ["theirs", *wrapped(*args, **kwargs)]

    def ours(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return ["ours", *wrapped(*args, **kwargs)]

    seam().wrap(theirs)
    seam().wrap(ours)
    seam().wrap(theirs)
    assert engine.Loader().load("c", "m") == ["ours", "theirs", "c", "m"]


def test_a_module_that_is_not_imported_yet_is_wrapped_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_engine.py").write_text("def load(config):\n    return config\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    late = Seam("late_engine", "load", ("config",), "for this test", ("1.0",))
    late.wrap(lambda wrapped, instance, args, kwargs: [wrapped(*args, **kwargs)])
    assert "late_engine" not in sys.modules
    import late_engine  # type: ignore[import-not-found]

    assert late_engine.load(1) == [1]


def test_every_vllm_seam_holds_in_the_installed_vllm() -> None:
    pytest.importorskip("vllm")
    from ep2tp.engines.vllm import seams

    assert [s.problem() for s in seams.ALL] == [None] * len(seams.ALL)
