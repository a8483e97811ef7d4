"""The seams in the sources of several versions of both engines, read from their wheels without installing them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ep2tp.engines.seams import Seam
from ep2tp.engines.sglang import arguments as sglang_arguments
from ep2tp.engines.sglang import seams as sglang
from ep2tp.engines.vllm import arguments as vllm_arguments
from ep2tp.engines.vllm import seams as vllm
from ep2tp.rewrite.parallel_plan import LaunchRules
from tests.engines import upstream, wheel_sources
from tests.engines.upstream import ENGINES
from tests.engines.wheel_sources import NoIndexError

TABLE = [
    (package, version, seam) for package, table in ENGINES.items() for seam in table.ALL for version in table.VERSIONS
]


def module(package: str, version: str, name: str) -> object:
    try:
        return wheel_sources.module(package, version, name)
    except NoIndexError as error:
        pytest.skip(f"needs a package index: {error}")


def problem(package: str, version: str, seam: Seam) -> str | None:
    try:
        return upstream.problem(package, version, seam)
    except NoIndexError as error:
        pytest.skip(f"needs a package index: {error}")


@pytest.mark.parametrize(("package", "version", "seam"), TABLE, ids=lambda v: getattr(v, "attribute", v))
def test_a_seam_holds_in_the_versions_that_it_names(package: str, version: str, seam: Seam) -> None:
    found = problem(package, version, seam)
    if version in seam.checked:
        assert found is None
    elif seam.attribute != "ServerArgs.__post_init__":  # it is there in later versions, and does nothing
        assert found is not None, f"{seam.attribute} is in {version} too; name it"


def test_a_changed_signature_would_be_noticed() -> None:
    seam = Seam(vllm.WEIGHTS.module, vllm.WEIGHTS.attribute, ("self", "model"), "", ())
    assert "model_config" in (problem("vllm", "0.33.0", seam) or "")
    assert problem("vllm", "0.33.0", Seam(vllm.WEIGHTS.module, "DefaultModelLoader.gone", (), "", ())) is not None


def test_the_newest_release_is_checked_against_the_last_known_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the nightly workflow runs; the newest release itself may change any day, and does not decide here."""
    problem("vllm", "0.32.0", vllm.WEIGHTS)  # skips without an index
    monkeypatch.setattr(vllm, "VERSIONS", ("0.25.1", "0.28.0"))
    known = [replace(seam, checked=("0.28.0",)) for seam in vllm.REQUIRED]
    monkeypatch.setattr(vllm, "ALL", [*known, replace(vllm.WEIGHTS, attribute="Gone.by", checked=("0.25.1",))])
    monkeypatch.setattr(wheel_sources, "newest", lambda package: "0.33.0")
    assert upstream.main(["vllm newest"]) == 0
    monkeypatch.setattr(vllm, "ALL", [*known, replace(vllm.WEIGHTS, attribute="Gone.by", checked=("0.28.0",))])
    assert upstream.main(["vllm newest"]) == 1
    first, second = (text.splitlines() for text in capsys.readouterr().out.split("vllm 0.33.0")[1:])
    assert [line.split()[0] for line in first[1:]] == ["holds"] * len(known)
    assert [line.split()[0] for line in second[1:]] == ["holds"] * len(known) + ["CHANGED"]


def test_every_release_is_listed_for_the_nightly_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    assert upstream.main(["--list"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"vllm 0.33.0", "vllm newest", "sglang 0.5.17", "sglang newest"} <= set(listed)


def test_the_page_about_versions_names_each_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2:4] for line in page.splitlines() if line.startswith("|")]
    for column, table in enumerate((vllm, sglang)):
        assert {version for row in rows for version in re.findall(r"[\d.]+\d", row[column])} == set(table.VERSIONS)


SETTINGS = {
    "vllm": (vllm_arguments.RULES, ["vllm.engine.arg_utils"]),
    "sglang": (
        sglang_arguments.RULES,
        ["sglang.srt.server_args", *(f"sglang.srt.arg_groups.fields.{n}" for n in ("parallel", "exec_", "spec"))],
    ),
}


@pytest.mark.parametrize("package", SETTINGS)
def test_every_setting_is_a_field_of_a_checked_version(package: str) -> None:
    rules, names = SETTINGS[package]
    sources = [text(package, version, name) for version in ENGINES[package].VERSIONS for name in names]
    assert {s.field for s in rules.settings if not any(re.search(rf"\b{s.field}: ", t) for t in sources)} == set()


def text(package: str, version: str, name: str) -> str:
    module(package, version, name)
    return Path(wheel_sources.CACHE / f"{package}-{version}" / f"{name}.py").read_text()


RUNNERS = "sglang.srt.layers.moe.moe_runner."
REGISTERED = re.compile(r'@register_(?:fused_func|pre_permute)\(\s*"(\w+)",\s*"(\w+)"')


@pytest.mark.parametrize("version", sglang.VERSIONS)
def test_every_moe_runner_but_those_that_are_reset_works_without_dispatch(version: str) -> None:
    """A runner takes tokens from a dispatcher: "none" and "standard" are the one that sends them nowhere."""
    names = ["aiter", "deep_gemm", "flashinfer_cutlass", "flashinfer_trtllm", "marlin", "triton", "triton_kernels"]
    files = [*(RUNNERS + name for name in names), "sglang.srt.layers.moe.flashinfer_megamoe"]
    found = [pair for name in files for pair in REGISTERED.findall(text("sglang", version, name))]
    everywhere = {runner for _, runner in found}
    without_dispatch = {runner for source, runner in found if source in ("none", "standard")}
    assert len(without_dispatch) > 5
    assert everywhere - without_dispatch <= only_expert_parallel(sglang_arguments.RULES)


def only_expert_parallel(rules: LaunchRules) -> frozenset[str]:
    return next(setting.only for setting in rules.triggers if setting.field == "moe_runner_backend")
