from __future__ import annotations

from pathlib import Path

import pytest

from ep2tp.model.same import is_same_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("name", ["model", "model/", "link", "other/../model"])
def test_another_spelling_of_a_folder_is_the_same_model(folder: Path, name: str) -> None:
    assert is_same_model(f"{folder}/{name}", f"{folder}/model")


@pytest.mark.parametrize("name", ["other", "absent"])
def test_another_folder_is_another_model(folder: Path, name: str) -> None:
    assert not is_same_model(f"{folder}/{name}", f"{folder}/model")


def test_hub_ids_are_compared_as_they_are() -> None:
    assert is_same_model("org/model", "org/model")
    assert not is_same_model("org/model", "org/other")
