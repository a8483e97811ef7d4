"""The generated pages say what the code says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.generate.__main__ import ROOT, stale
from docs.generate.pages import BEGIN, all_pages, between
from docs.generate.published import PAGES
from ep2tp.layout.split import Split
from ep2tp.model.families import load_families
from ep2tp.planner.gpus import find_gpu
from ep2tp.planner.memory import GB, usable_bytes
from tests.planner.models import MODELS


def test_generated_pages_are_up_to_date() -> None:
    assert not stale(), "run python -m docs.generate, from the repository"


def test_a_page_that_was_edited_by_hand_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path, text in all_pages(ROOT).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    monkeypatch.setattr("docs.generate.__main__.ROOT", tmp_path)
    assert not stale()
    page = tmp_path / "docs/guides/serving/qwen.md"
    page.write_text(page.read_text(encoding="utf-8").replace("+33%", "+3%", 1), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("| all |", "| none |", 1), encoding="utf-8")
    assert sorted(stale()) == ["README.md", "docs/guides/serving/qwen.md"]


def test_markers_that_are_gone_are_an_error() -> None:
    with pytest.raises(ValueError, match="end support"):
        between(BEGIN.format(name="support"), "support", "")


def test_the_serving_pages_cover_every_model_that_the_planner_knows() -> None:
    served = {model.name for _, models in PAGES.values() for model in models}
    same_shape = {
        "DeepSeek-V2": "too large to be of use here",
        "Kimi-VL-A3B": "Moonlight's",
        "Llama-4-Maverick": "Scout's",
    }
    assert served | set(same_shape) == set(MODELS)


def test_the_serving_pages_say_where_expert_parallelism_is_the_better_plan() -> None:
    page = (ROOT / "docs/guides/serving/glm.md").read_text(encoding="utf-8")
    _, _, flash = page.partition("## GLM-4.7-Flash")
    assert "- 2 GPUs: Expert parallelism is the better plan at batch 64 (DEP 2)" in flash
    assert "(../../concepts/when-ep.md)" in flash


def test_the_serving_pages_count_memory_in_one_unit() -> None:
    page = (ROOT / "docs/guides/serving/deepseek.md").read_text(encoding="utf-8")
    gpu = find_gpu("RTX PRO 6000")
    usable = f"{usable_bytes(gpu.memory_gb) / GB:.1f}"
    assert f"| PRO 6000, {gpu.memory_gb:.0f}&nbsp;GB |" in page
    assert f"{gpu.memory_gb:.0f} of these, of which {usable} are counted as usable" in page
    assert re.search(rf"^2 and 4 x RTX PRO 6000: does not fit; .* [\d.]+ and [\d.]+ GB a GPU, of {usable}", page, re.M)


def test_checkpoints_of_several_models_have_the_hub_ids_of_the_others() -> None:
    checkpoints = [
        (served.title, found) for _, models in PAGES.values() for served in models for found in served.checkpoints
    ]
    shared = [found for title, found in checkpoints if ", " in title or found.hub == "MODEL"]
    assert len(shared) > 10
    assert all(found.others for found in shared)


def test_the_readme_names_every_patch() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [family.title for family in load_families().values() if family.title not in readme] == []


def test_padded_sizes_of_the_concept_page_are_the_codes() -> None:
    page = (ROOT / "docs/concepts/blocks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| (\d+) \| (\d+) \| (\d+) \| (none|\+[\d.]+%) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for size, ranks, padded, cost in rows:
        split = Split.of_blocks(int(size), 128, int(ranks))
        assert split.padded == int(padded)
        assert cost == ("none" if split.is_exact else f"+{split.overhead:.1%}")
