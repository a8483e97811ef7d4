"""``ep2tp plan`` end to end: real models, every kind of source, bad input, the plot, and calibration with gloo."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ep2tp import reshard
from ep2tp.cli import main
from tests.checkpoint.checkpoints import Model
from tests.checkpoint.test_hub import Hub
from tests.planner.models import config

PLAN_KEYS = {
    "plan", "tp", "ep", "dp", "pp", "fits", "divides", "weights_gb_per_gpu", "padding_percent", "straggler",
    "comm_bytes_per_layer_per_rank", "decode_ms",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_stored_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


def run(*words: str, columns: int = 120) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["plan", *words], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def plan(folder: Path, name: str, form: str, *words: str) -> dict[str, Any]:
    path = folder / "config.json"
    path.write_text(json.dumps(config(name, form)))
    status, out, err = run(str(path), "--json", *words)
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("name", "form", "total"),
    [
        ("DeepSeek-V3/R1/V3.1", "fp8_block128", 672.6),
        ("Kimi-K2-Instruct", "fp8_block128", 1027.6),
        ("GLM-4.5/4.6/4.7", "bf16", 705.6),
        ("Qwen3-235B-A22B", "fp8_block128", 235.8),
        ("gpt-oss-120b", "mxfp4", 65.2),
    ],
)
def test_json_of_real_models(tmp_path: Path, name: str, form: str, total: float) -> None:
    found = plan(tmp_path, name, form, "--gpus", "4", "--gpu", "RTX PRO 6000", "--link", "pcie5", "--batch", "1,8,64")
    assert found["model"]["weights_gb"] == pytest.approx(total, rel=0.004)
    plans = {(p["plan"], p["tp"], p["ep"], p["dp"], p["pp"]): p for p in found["plans"]}
    assert set(plans) == {
        ("TP", 4, 1, 1, 1), ("TEP", 4, 4, 1, 1), ("DEP", 1, 4, 4, 1), ("TPxPP", 2, 1, 1, 2), ("TPxPP", 1, 1, 1, 4),
        ("TPxEP", 2, 2, 1, 1),
    }  # fmt: skip
    for p in plans.values():
        assert set(p) >= PLAN_KEYS
        for key in ("straggler", "comm_bytes_per_layer_per_rank", "decode_ms"):
            assert list(p[key]) == ["1", "8", "64"]
        assert sum(p["weights_gb_by_part"].values()) - p["weights_gb_by_part"]["padding"] == pytest.approx(
            p["weights_gb_per_gpu"], abs=0.005
        )
        assert p["decode_ms"]["1"] == pytest.approx(sum(p["decode_ms_by_part"]["1"].values()), abs=0.001)
    tp, tep, dep = (next(p for p in plans.values() if p["plan"] == kind) for kind in ("TP", "TEP", "DEP"))
    assert tp["straggler"] == {"1": 1.0, "8": 1.0, "64": 1.0}
    assert tep["straggler"] == dep["straggler"]
    assert tep["straggler"]["1"] > tep["straggler"]["8"] > tep["straggler"]["64"] > 1
    hidden = found["model"]["hidden"]
    assert tp["comm_bytes_per_layer_per_rank"]["64"] == 2 * 3 * 64 * hidden * 2 // 4
    assert tep["comm_bytes_per_layer_per_rank"] == tp["comm_bytes_per_layer_per_rank"]
    assert dep["comm_bytes_per_layer_per_rank"]["64"] == 2 * 3 * 64 * hidden * 2 // 4
    assert dep["weights_gb_per_gpu"] > tep["weights_gb_per_gpu"]
    view = found["memory_view"]
    assert view["TP=N"] == view["replicated experts, a slice of each"] == tp["weights_gb_per_gpu"]
    assert (view["EP=N"], view["whole model"]) == (dep["weights_gb_per_gpu"], found["model"]["weights_gb"])
    assert "TPxEP 2x2" in view


def test_verdict_in_json(tmp_path: Path) -> None:
    found = plan(tmp_path, "Qwen3-235B-A22B", "fp8_block128", "--gpus", "8", "--gpu", "RTX PRO 6000", "--batch", "1")
    tp = found["plans"][0]
    assert (tp["plan"], tp["fits"], tp["divides"], tp["padding_percent"]) == ("TP", True, False, 33.33)
    assert tp["padded_fields"] == {"moe_intermediate_size": [1536, 2048]}
    assert {b["outcome"] for b in tp["stock_engines"]} == {"runs", "refuses"}
    verdict = found["verdict"]
    assert verdict["plan"] in {p["plan"] for p in found["plans"]}
    assert verdict["reasons"]
    assert verdict["commands"]["vllm"].startswith("EP2TP=")
    assert f"vllm serve {tmp_path}" in verdict["commands"]["vllm"]
    assert "sglang serve" in verdict["commands"]["sglang"]
    assert found["label"].startswith("computed")


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(tmp_path: Path, columns: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("DeepSeek-V3/R1/V3.1", "fp8_block128")))
    words = (str(tmp_path), "--gpus", "8", "--gpu", "H200", "--link", "host", "--batch", "1,8,64")
    status, out, _ = run(*words, columns=columns)
    assert status == 0
    tables = out.partition("Verdict")[0]
    assert max(map(len, tables.splitlines())) <= columns
    assert "…" not in tables
    for part in (
        "TP 8",
        "TPxPP 2x4",
        "TPxEP 4x2",
        "whole copy",
        "busy 64",
        "Verdict",
        "vllm serve",
        "NCCL_P2P_DISABLE=1",
    ):
        assert part in out


@pytest.mark.parametrize("batches", ["1", "1,2,4,8,16,32,64,128,256"])
def test_each_table_and_the_verdict_say_that_they_are_computed(tmp_path: Path, batches: str) -> None:
    """In a pipe, at 80 columns, where many batches take several tables of one kind."""
    (tmp_path / "config.json").write_text(json.dumps(config("Qwen3-30B-A3B")))
    status, out, _ = run(str(tmp_path), "--gpus", "4", "--gpu", "H200", "--batch", batches, columns=80)
    assert status == 0
    said = " ".join(out.split())
    heads = ("plan batch", "plan weights", "plan collectives")  # what each table begins with, below its title
    titles = [said[: found.start()][-100:] for head in heads for found in re.finditer(head, said)]
    assert (len(titles) > 3) == (batches != "1")
    assert all("computed" in title for title in titles)
    assert "Verdict (times are computed bounds, not measured)" in said


def test_a_folder_with_weights_is_summed_exactly(tmp_path: Path) -> None:
    folder = Model("int4_g32", files=2).write(tmp_path / "model")
    status, out, err = run(str(folder), "--gpus", "2", "--memory", "10", "--json")
    assert status == 0, err
    found = json.loads(out)["model"]
    assert found["sizes_from"] == "safetensors headers"
    data = sum(tensor_bytes(file) for file in folder.glob("*.safetensors"))
    assert found["weights_gb"] + found["mtp_gb"] == pytest.approx(data / 1e9, abs=0.002)


def tensor_bytes(file: Path) -> int:
    raw = file.read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


class CountingHub(Hub):
    """Also counts the bytes that it sends."""

    sent: list[int]

    def reply(self, status: int, body: bytes, with_body: bool, etag: str = "0") -> None:
        self.sent.append(len(body) if with_body else 0)
        super().reply(status, body, with_body, etag)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[CountingHub]]]:
    folder = tmp_path / "hub"
    Model("int4_g32", files=4).write(folder / "model")
    handler = type("Served", (CountingHub,), {"folder": folder, "requests": [], "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def test_a_hub_model_is_planned_from_its_headers_alone(hub: tuple[str, type[CountingHub]], tmp_path: Path) -> None:
    address, handler = hub
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    words = ["--gpus", "2", "--memory", "10", "--json"]
    command = [sys.executable, "-m", "ep2tp", "plan"]
    done = subprocess.run(
        [*command, "lab/model", "--revision", "v1", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    remote = json.loads(done.stdout)
    _, out, _ = run(str(handler.folder / "model"), *words)
    local = json.loads(out)
    assert remote["plans"] == local["plans"]
    assert remote["model"]["source"] == "lab/model"
    assert all("--revision v1" in launch for launch in remote["verdict"]["commands"].values())
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert all(size <= 100_000 for size in handler.sent)
    missing = subprocess.run(
        [*command, "lab/other", *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: lab/other: ")
    assert "Traceback" not in missing.stderr


def test_patches_reads_a_hub_model_as_plan_does_but_no_weights(
    hub: tuple[str, type[CountingHub]], tmp_path: Path
) -> None:
    address, handler = hub
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "ep2tp", "patches", "--model", "lab/model", "--tp", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("lab/model: patch ")
    assert handler.requests
    assert not any("safetensors" in request for request in handler.requests)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "name a model"),
        (("MODEL",), 2, "--gpus"),
        (("MODEL", "--gpus", "0"), 2, "0 is not in the range"),
        (("MODEL", "--gpus", "2", "--batch", "1,x"), 2, "1,8,64"),
        (("MODEL", "--gpus", "2", "--batch", "0"), 2, "1,8,64"),
        (("MODEL", "--gpus", "2", "--memory", "-4"), 2, "--memory"),
        (("MODEL", "--gpus", "2", "--gpu", "TPU"), 1, "ep2tp knows RTX PRO 6000"),
        (("MODEL", "--gpus", "2", "--link", "carrier-pigeon"), 1, "nvlink, host, socket"),
        (("MODEL", "--gpus", "2", "--link", "MODEL"), 1, "not a profile"),
        (("MODEL", "--gpus", "2", "--output", "x"), 2, "--calibrate"),
        (("MODEL", "--gpus", "2", "--revision", "main"), 2, "--revision goes with a hub model"),
        (("no/such/model", "--gpus", "2"), 1, "no/such/model: no such file or folder"),
        (("./missing", "--gpus", "2"), 1, "./missing: no such file or folder"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, words: tuple[str, ...], status: int, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config("Qwen3-30B-A3B")))
    found, out, err = run(*(str(path) if word == "MODEL" else word for word in words))
    assert (found, out) == (status, "")
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "expected an object"),
        ('{"model_type": "llama"}', "no routed experts"),
        ('{"model_type": "mystery", "num_experts": 8}', "no patch in force matches"),
        ('{"model_type": "qwen3_moe", "num_experts": 8}', "moe_intermediate_size"),
        ('{"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": "2", "moe_intermediate_size": 1}', "="),
    ],
)
def test_a_bad_config_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    status, out, err = run(str(tmp_path / "config.json"), "--gpus", "2")
    assert (status, out) == (1, "")
    assert message in err
    assert "config.json" in err


@pytest.mark.parametrize("named", ["", "config.json"])
def test_a_file_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    status, out, err = run(str(tmp_path / named), "--gpus", "2")
    assert (status, out) == (1, "")
    assert f"{tmp_path / 'config.json'}: Permission denied" in err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts_per_tok", 129, "of which a token uses 129"),
        ("mlp_only_layers", list(range(48)), "leaves none of its 48 layers"),
        ("mlp_only_layers", 7, "contradicts itself"),
        ("layer_types", 7, "contradicts itself"),
        ("vocab_size", "many", "vocab_size='many'"),
        ("moe_layer_freq", [1, 1], "contradicts itself"),
        ("num_key_value_heads", 0, "num_key_value_heads=0; expected a whole number from 1"),
        ("num_key_value_heads", True, "num_key_value_heads=True; expected"),
        ("architectures", 5, "architectures=5; expected a list of names"),
        ("sliding_window", "4096", "sliding_window='4096'; expected a whole number from 0"),
        ("head_dim", "x" * 9999, f"head_dim='{'x' * 99}; expected"),
    ],
)
def test_a_field_that_makes_no_sense(tmp_path: Path, field: str, value: object, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config("Qwen3-30B-A3B"), field: value}))
    status, out, err = run(str(tmp_path), "--gpus", "2")
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("memory", ["nan", "inf", "-inf"])
def test_a_memory_that_is_no_number_of_gb(tmp_path: Path, memory: str) -> None:
    status, _, err = run(str(tmp_path), "--gpus", "2", "--memory", memory)
    assert status == 2
    assert "--memory" in err


def test_files_of_ranks_load_in_one_way(tmp_path: Path) -> None:
    source = Model("fp8_block_f32").write(tmp_path / "source")
    reshard(source, tmp_path / "ranks", tp=2, layout="ranks")
    status, out, err = run(str(tmp_path / "ranks"), "--gpus", "4")
    assert (status, out) == (1, "")
    command = f"vllm serve {tmp_path / 'ranks'} --tensor-parallel-size 2 --load-format ep2tp"
    assert command in err.replace("\n", " ")
    reshard(source, tmp_path / "padded", tp=2)
    assert run(str(tmp_path / "padded"), "--gpus", "2")[0] == 0


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    status, _, err = run(str(tmp_path), "--gpus", "2")
    assert status == 1
    assert "has no config.json" in err


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, image = tmp_path / "config.json", tmp_path / "plans.png"
    path.write_text(json.dumps(config("Qwen3-30B-A3B")))
    status, _, err = run(str(path), "--gpus", "4", "--batch", "1,64", "--plot", str(image))
    assert status == 0, err
    raw = image.read_bytes()
    assert raw.startswith(b"\x89PNG")
    width, height = (int.from_bytes(raw[at : at + 4], "big") for at in (16, 20))
    assert width > height > 500
    status, _, err = run(str(path), "--gpus", "4", "--plot", str(tmp_path / "plans.xyz"))
    assert (status, "Traceback" in err) == (1, False)
    assert "xyz" in err


def test_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config("Qwen3-30B-A3B")))
    status, _, err = run(str(path), "--gpus", "2", "--plot", str(tmp_path / "plans.png"))
    assert status == 1
    assert "pip install 'ep2tp[plot]'" in err


def test_calibration_with_gloo_is_used_by_later_plans(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config("Qwen3-30B-A3B")))
    words = (str(path), "--gpus", "2", "--gpu", "L40S", "--json")
    before = json.loads(run(*words)[1])
    assert "assumed" in before["machine"]["link_source"]
    status, out, err = run("--calibrate", "--gpus", "2")
    assert (status, out) == (0, "")
    assert "gloo" in err
    stored = json.loads((tmp_path / "xdg/ep2tp/links.json").read_text())
    measured = {(row["op"], row["bytes"]): row["us"] for row in stored["collectives"]}
    assert {"all_reduce", "all_gather"} <= {op for op, _ in measured}
    assert min(measured.values()) > 0 and {1 << 13, 1 << 22} <= {size for _, size in measured}
    assert stored["memory_bandwidth"] > 1e8
    after = json.loads(run(*words)[1])
    assert after["machine"]["link_source"].startswith("measured: 2x CPU, gloo")
    assert after["machine"]["memory_bandwidth_gb_s"] == 864  # measured on another device, so not the GPU's
    given = json.loads(run(*words, "--link", str(tmp_path / "xdg/ep2tp/links.json"))[1])
    assert given["plans"] == after["plans"]
    assert json.loads(run(*words, "--link", "nvlink")[1])["machine"]["link"] == "nvlink"


def test_a_profile_stored_elsewhere_is_used_when_it_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model, stored = tmp_path / "config.json", tmp_path / "my links.json"
    model.write_text(json.dumps(config("Qwen3-30B-A3B")))
    status, _, err = run("--calibrate", "--gpus", "2", "--output", str(stored))
    assert status == 0
    assert f"later plans use it with --link '{stored}'" in err
    words = (str(model), "--gpus", "2", "--gpu", "L40S", "--json")
    assert "assumed" in json.loads(run(*words)[1])["machine"]["link_source"]
    assert json.loads(run(*words, "--link", str(stored))[1])["machine"]["link_source"].endswith(f"({stored})")


def test_a_rank_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from ep2tp.errors import Ep2tpError
    from ep2tp.planner import calibrate

    with pytest.raises(Ep2tpError, match="did not finish in 0 s"):
        calibrate.calibrate(2, tmp_path / "x.json", limit_s=0)
    with pytest.raises(Ep2tpError, match="rank 0 failed"):
        calibrate._run(1, "no-such-backend", 60)
    assert not (tmp_path / "x.json").exists()


def test_planning_imports_no_torch() -> None:
    code = "import sys, ep2tp.commands.plan, ep2tp.planner.advise, ep2tp.planner.calibrate, ep2tp.planner.report\n"
    code += "import ep2tp.planner.summary, ep2tp.planner.source, ep2tp.planner.machine\n"
    code += "print([name for name in ('torch', 'vllm', 'sglang', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
