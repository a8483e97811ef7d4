"""Which config a name on the command line leads to, with ModelOpt's hf_quant_config.json beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ep2tp.cli import main
from ep2tp.errors import CheckpointError, ModelError
from ep2tp.model.locate import MODELOPT, find_config
from ep2tp.planner.source import load_model
from tests.planner.models import config

QUANTIZATION = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
GLM = config("GLM-4.5-Air", "bf16")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """GLM-4.5-Air as ModelOpt exports it in NVFP4: config.json says nothing about quantisation."""
    folder = tmp_path / "models--o--m" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(GLM))
    (folder / MODELOPT).write_text(json.dumps(QUANTIZATION))
    return folder


def test_patches_and_plan_read_modelopts_own_file(folder: Path) -> None:
    out = CliRunner().invoke(main, ["patches", "--model", str(folder), "--tp", "16"]).output
    assert "nvfp4" in out
    assert "bf16" not in out
    assert "nothing to pad" not in out
    facts, _ = load_model(str(folder))
    assert find_config(str(folder)) == find_config(str(folder / "config.json")) == facts.config


def test_null_in_config_json_says_nothing_about_quantisation(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**GLM, "quantization_config": None}))
    facts, _ = load_model(str(folder))
    assert {c.format_names for c in facts.classes} == {"nvfp4"}


def test_plan_reads_it_beside_a_config_json_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, inventory = load_model(str(folder))
    assert {c.format_names for c in facts.classes} == {"nvfp4"}
    named, computed = load_model(str(folder / "config.json"))
    assert (named.config, named.classes, computed) == (facts.config, facts.classes, inventory)
    monkeypatch.chdir(folder)
    assert load_model("config.json")[0].config == facts.config


def test_a_config_under_another_name_is_all_that_is_known_of_its_model(folder: Path) -> None:
    other = folder / "glm.json"
    other.write_text(json.dumps(GLM))
    assert load_model(str(other))[0].config == GLM


def test_plan_reads_no_config_json_that_leads_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    for named in (folder, folder / "config.json"):
        with pytest.raises(CheckpointError, match=r"config.json: leads to .*elsewhere.json, outside of"):
            load_model(str(named))


def test_config_json_comes_first(folder: Path) -> None:
    own = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(GLM | {"quantization_config": own}))
    assert find_config(str(folder))["quantization_config"] == own


def test_links_lead_to_the_hubs_blobs_and_nowhere_else(folder: Path, tmp_path: Path) -> None:
    blob = folder.parents[1] / "blobs" / "d0"
    blob.parent.mkdir()
    (folder / MODELOPT).rename(blob)
    (folder / MODELOPT).symlink_to("../../blobs/d0")
    assert find_config(str(folder))["quantization_config"] == {"quant_method": "modelopt", **QUANTIZATION}
    blob.rename(tmp_path / "elsewhere.json")
    (folder / MODELOPT).unlink()
    (folder / MODELOPT).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ModelError, match=f"{MODELOPT}: leads to .*elsewhere.json, outside of"):
        find_config(str(folder))


@pytest.mark.parametrize(
    ("text", "message"), [(b"{", "not a JSON file"), (b"\xff", "not a JSON"), (b"[]", "JSON list")]
)
def test_a_damaged_file_is_named(text: bytes, message: str, folder: Path) -> None:
    (folder / MODELOPT).write_bytes(text)
    with pytest.raises(ModelError, match=f"{MODELOPT}: .*{message}"):
        find_config(str(folder))


def test_a_file_larger_than_any_such_file_is_refused(folder: Path) -> None:
    with (folder / MODELOPT).open("r+b") as file:
        file.truncate(100_000_001)
    with pytest.raises(ModelError, match=f"{MODELOPT}: larger than 100000000 bytes"):
        find_config(str(folder))
