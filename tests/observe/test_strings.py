"""The engines still have the words that the detector looks for.

Checked in what is installed here, and in every unpacked release that ``EP2TP_ENGINE_SOURCES`` names (folders that hold
a ``vllm`` or ``sglang`` package, with colons between). Run by hand over vLLM 0.25.1, 0.28.0, 0.32.0 and 0.33.0, and
SGLang 0.5.17, 0.5.18, 0.5.20, 0.5.22 and 0.5.23.
"""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from ep2tp.observe import sglang_log, vllm_log
from ep2tp.observe.signs import Sign

TABLES = {"vllm": ("", vllm_log.SIGNS), "sglang": ("srt", sglang_log.SIGNS)}


def packages() -> list[tuple[str, Path]]:
    given = [Path(folder) for folder in os.environ.get("EP2TP_ENGINE_SOURCES", "").split(":") if folder]
    installed = [PathFinder.find_spec(engine) for engine in TABLES]
    folders = [Path(spec.origin).parent for spec in installed if spec and spec.origin]
    folders += [folder / engine for folder in given for engine in TABLES if (folder / engine).is_dir()]
    return [(folder.name, folder) for folder in folders]


def has_words(package: Path, sign: Sign) -> bool:
    assert sign.origin is not None
    place, words = sign.origin
    files = [package / place] if place.endswith(".py") else (package / place).rglob("*.py")
    return any(words in file.read_text(errors="replace") for file in files if file.is_file())


@pytest.mark.parametrize(("engine", "package"), packages(), ids=lambda value: str(value))
def test_the_engine_has_the_words(engine: str, package: Path) -> None:
    below, signs = TABLES[engine]
    missing = [sign.name for sign in signs if not has_words(package / below, sign)]
    assert not missing


def test_words_that_are_not_there_are_missed(tmp_path: Path) -> None:
    (tmp_path / "entrypoints").mkdir()
    (tmp_path / "entrypoints" / "llm.py").write_text('logger.info("non-default arguments: %s")\n')
    assert not has_words(tmp_path, vllm_log.SIGNS[0])
    (tmp_path / "entrypoints" / "llm.py").write_text('logger.info("non-default args: %s", x)\n')
    assert has_words(tmp_path, vllm_log.SIGNS[0])
