"""What ep2tp pads in one engine only: two sets of figures, and each engine's own best plan."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from ep2tp.cli import main
from ep2tp.engines.vllm import experts
from ep2tp.planner.advise import Verdict, advise
from ep2tp.planner.compare import Assessment, Question, as_run_by, assess_all
from ep2tp.planner.engine_plans import OLDER_VLLM, exact_in_vllm
from ep2tp.planner.layouts import Layout
from ep2tp.planner.memory import GB
from ep2tp.planner.report import print_report
from tests.planner.models import assessed, config, model

QWEN = ("Qwen3-235B-A22B", "fp8_block128", 8, "L40S")


def printed(question: Question, plans: dict[str, Assessment], width: int = 400) -> tuple[Verdict, str]:
    found = advise(question, list(plans.values()))
    console = Console(file=io.StringIO(), width=width)
    print_report(console, question, list(plans.values()), found)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_weights_are_padded_in_sglang_and_not_in_vllm() -> None:
    """By hand: the routed experts of 94 layers are 94 x 128 x 3 x 4096 x 1536 bytes and a scale for 128 x 128."""
    _, plans = assessed(*QWEN)
    in_vllm, in_sglang = (as_run_by(engine, [plans["TP 8"]])[0] for engine in ("vLLM", "SGLang"))
    routed = 94 * 128 * 3 * 4096 * 1536 * (1 + 4 / 128**2) / 8
    assert in_vllm.weights.routed == pytest.approx(routed)
    assert in_sglang.weights.routed == pytest.approx(routed * 2048 / 1536)
    assert (in_vllm.weights.total / GB, in_sglang.weights.total / GB) == pytest.approx((29.69, 39.16), abs=0.01)
    assert (in_vllm.weights.padding, in_vllm.sequences, in_sglang.sequences) == (0, 29, 5)
    assert (in_vllm.padded_in, in_sglang.padded_in) == ((), ("SGLang", OLDER_VLLM))
    assert in_vllm.decode[1].weights < in_sglang.decode[1].weights
    assert in_vllm.decode[1].communication == in_sglang.decode[1].communication


def test_each_engine_has_its_own_best_plan_and_the_text_does_not_contradict_itself() -> None:
    found, text = printed(*assessed(*QWEN))
    assert {engine: str(best and best.layout) for engine, best in found.by_engine.items()} == {
        "vllm": "TP 8",
        "sglang": "TPxPP 4x2",
    }
    assert "--tensor-parallel-size 8 " in str(found.commands["vllm"])
    assert found.commands["vllm"].note.startswith("vLLM 0.32 or later; ")
    assert "vLLM 0.32" not in found.commands["sglang"].note
    assert "--tp-size 4 --pp-size 2" in str(found.commands["sglang"])
    [pads] = [line for line in text.splitlines() if "ep2tp pads moe_intermediate_size" in line]
    assert pads.rstrip().endswith("1536 -> 2048 (+33.3%) in SGLang and vLLM before 0.32")
    assert "vLLM: TP 8: the least decode time" in text
    assert "SGLang: TPxPP 4x2: the least decode time" in text
    said = [reason for reason in found.reasons if "hold nothing but padding" in reason or "pads what" in reason]
    assert not [reason for reason in said if not reason.startswith("SGLang: ")]
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("TP 8 ")]
    assert ["TP", "8", "vLLM", "29.7"] in [row[:4] for row in rows]
    assert ["TP", "8", "SGLang", "39.2"] in [row[:4] for row in rows]


@pytest.mark.parametrize(
    ("name", "gpus", "in_sglang"), [("Qwen3-30B-A3B", 4, "TPxEP 2x2"), ("Qwen3-Coder-480B", 8, "TPxEP 4x2")]
)
def test_vllm_has_a_launch_where_sglang_slices_and_spreads(name: str, gpus: int, in_sglang: str) -> None:
    found, _ = printed(*assessed(name, "fp8_block128", gpus))
    sglang = found.by_engine["sglang"]
    assert sglang is not None and str(sglang.layout) == in_sglang
    assert f"--tensor-parallel-size {gpus} " in str(found.commands["vllm"])
    assert "--ep-size 2" in str(found.commands["sglang"])


def test_an_engine_that_does_not_run_the_best_plan_gets_another_and_is_told_why() -> None:
    question, plans = assessed("Qwen3-30B-A3B", "bf16", 4)
    some = [plans["TPxEP 2x2"], plans["TPxPP 1x4"]]
    found = advise(replace(question, batches=(64,)), some)
    assert found.best is plans["TPxEP 2x2"]
    assert "--ep-size 2" in str(found.commands["sglang"])
    assert "--pipeline-parallel-size 4" in str(found.commands["vllm"])
    [why] = [reason for reason in found.reasons if reason.startswith("vLLM does not run TPxEP 2x2: ")]
    assert "Of what it runs, TPxPP 1x4: the least decode time" in why


def test_an_engine_in_which_nothing_fits_has_no_command() -> None:
    question, _ = assessed(*QWEN, context=1024)
    question = replace(question, gpu=replace(question.gpu, memory_gb=38))
    plans = [a for a in assess_all(question) if a.layout.plan == "TP"]
    found = advise(question, plans)
    assert found.commands["vllm"].command
    assert str(found.commands["sglang"]) == "# no plan fits in SGLang"
    assert found.reasons[0].startswith("SGLang: No plan fits: TP 8 needs least, 39.")


def test_what_vllm_slices_in_whole_blocks_has_one_row_but_is_not_said_to_be_padded_there() -> None:
    question, plans = assessed("gpt-oss-120b", "mxfp4", 8)
    assert (plans["TP 8"].in_vllm, plans["TP 8"].padded_in) == (None, ("SGLang",))
    found, text = printed(question, {"TP 8": plans["TP 8"]})
    assert "ep2tp pads intermediate_size 2880 -> 3072 (+6.7%) in SGLang\n" in text.replace(" \n", "\n").replace(
        "  ", ""
    )
    assert any("pads what does not divide, in SGLang only: +6.7%" in reason for reason in found.reasons)


def test_a_field_that_another_class_grows_is_padded_in_both() -> None:
    """GLM-4.5's shared expert has the routed experts' field, and vLLM refuses it."""
    _, plans = assessed("GLM-4.5/4.6/4.7", "fp8_block128", 8)
    assert (plans["TP 8"].in_vllm, plans["TP 8"].padded_in) == (None, ("vLLM", "SGLang"))
    assert plans["TEP 8"].padded_in == ()


@pytest.mark.parametrize("name", ["Qwen3-235B-A22B", "Qwen3-30B-A3B", "Qwen3-Next-80B", "DeepSeek-V3/R1/V3.1"])
@pytest.mark.parametrize("form", ["fp8_block128", "fp8_channel", "nvfp4"])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 32])
def test_the_planner_leaves_to_vllm_what_the_plugin_leaves(
    monkeypatch: pytest.MonkeyPatch, name: str, form: str, ranks: int
) -> None:
    oracle = SimpleNamespace(refine_fp8_moe_block_shape=None)  # that of vLLM 0.32, without vLLM
    monkeypatch.setattr(experts, "importlib", SimpleNamespace(import_module=lambda _: oracle))
    facts, _ = model(name, form)
    assert set(exact_in_vllm(facts, Layout("TP", tp=ranks))) == set(experts.left_to_engine(facts, ranks, "auto"))


def test_json_keeps_the_padded_figures_and_adds_vllms(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(*QWEN[:2])), encoding="utf-8")
    words = ["plan", str(path), "--gpus", "8", "--gpu", "L40S", "--link", "pcie5", "--json"]
    found = json.loads(CliRunner().invoke(main, words).stdout)
    tp, tep = found["plans"][:2]
    assert (tp["weights_gb_per_gpu"], tp["sequences_that_fit"]) == (39.156, 5)
    assert (tp["in_vllm"]["weights_gb_per_gpu"], tp["in_vllm"]["sequences_that_fit"]) == (29.691, 29)
    assert (tp["in_vllm"]["padded_fields"], tep["in_vllm"]) == ({}, None)
    assert found["verdict"]["plan"] == "TPxPP"
    assert found["verdict"]["by_engine"]["vllm"] == {"plan": "TP", "tp": 8, "ep": 1, "dp": 1, "pp": 1}
    assert found["verdict"]["by_batch_in_vllm"]["1"] == "TP 8"


def test_tables_with_a_row_for_each_engine_fit_80_columns() -> None:
    _, text = printed(*assessed("Qwen3-Next-80B", "fp8_block128", 8, "L40S"), width=80)
    tables = text.partition("Verdict")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
