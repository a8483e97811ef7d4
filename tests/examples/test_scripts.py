"""The examples that start no engine, each run as its first lines say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ep2tp import __version__
from ep2tp.demo.tiny import TinyModel
from ep2tp.engines.vllm import seams

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LOGS = ROOT / "tests" / "data" / "logs"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PATH": scripts, "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_example_is_named_where_they_are_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.*") if path.suffix in (".py", ".sh", ".toml")}
    files |= {path.relative_to(EXAMPLES) for path in (EXAMPLES / "server").iterdir()}
    assert len(files) >= 9
    assert [str(path) for path in files if f"({path})" not in listed] == []


@pytest.mark.parametrize(
    ("log", "status"),
    [
        ("vllm-0.32.0-tp2.log", 0),
        ("vllm-0.32.0-tep2-rewritten.log", 0),
        ("sglang-0.5.23-tp2.log", 0),
        ("vllm-0.25.1-gpu-tep2.log", 1),
        ("vllm-0.25.1-gpu-dep2.log", 1),
    ],
)
def test_the_gate_opens_for_tensor_parallel_launches_only(log: str, status: int) -> None:
    done = run(EXAMPLES / "detect_gate.sh", LOGS / log)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("gate: passed" in done.stdout) == (status == 0)


def test_plans_are_compared_in_python(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TinyModel(heads=16).config()))
    done = run(sys.executable, EXAMPLES / "plan_in_python.py", tmp_path, "--gpu", "RTX PRO 6000", "--link", "pcie5")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16"]
    assert rows[0][1:3] == ["TP", "1"]


def records(*tokens: list[int], margin: float = 0.0) -> str:
    likeliest = [{"5": -0.5, "6": -0.5 - margin}] * 3
    lines = [{"prompt": [1, i], "tokens": chosen, "likeliest": likeliest} for i, chosen in enumerate(tokens)]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize(
    ("second", "margin", "status", "says"),
    [
        ([5, 5, 6], 1.0, 0, "prompt 1: 3 tokens equal"),
        ([5, 6, 6], 0.01, 0, "prompt 1: part at token 1, margin 0.010: near-tie"),
        ([5, 6, 6], 1.0, 1, "prompt 1: part at token 1, margin 1.000: NOT A TIE"),
    ],
)
def test_tokens_that_part_are_told_from_faults(
    second: list[int], margin: float, status: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(records([5, 5, 5], [5, 5, 6], margin=margin))
    (tmp_path / "b.jsonl").write_text(records([5, 5, 5], second, margin=margin))
    done = run(sys.executable, EXAMPLES / "compare_tokens.py", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (done.returncode, done.stdout.splitlines()) == (status, ["prompt 0: 3 tokens equal", says])


def test_the_patch_of_ones_own_is_used_to_reshard(tmp_path: Path) -> None:
    """A tiny checkpoint that has the names of the example, and nothing that a patch of ep2tp's own matches."""
    source = acme_model(tmp_path / "source")
    own = {"EP2TP_PATCH_PATH": str(EXAMPLES / "patches")}
    ep2tp = (sys.executable, "-m", "ep2tp")
    assert "no patch" in run(*ep2tp, "patches", "--model", source).stderr.lower()
    assert "acme_moe" in run(*ep2tp, "patches", "--model", source, "--tp", "2", **own).stdout
    done = run(*ep2tp, "reshard", source, tmp_path / "padded", "--tp", "2", **own)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["intermediate_size"]) == (80, 336)
    assert run(*ep2tp, "verify", tmp_path / "padded", "--source", source, **own).returncode == 0


def acme_model(folder: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    TinyModel(expert_size=75, dense_size=325).write(folder, "float32")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["AcmeMoeForCausalLM"], "model_type": "acme_moe"}
    (folder / "config.json").write_text(json.dumps(config))
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for path in folder.glob("*.safetensors"):
        tensors = {}
        for name, tensor in safetensors.load_file(path).items():
            if "shared_experts" not in name:
                renamed = re.sub("gate_proj|up_proj|down_proj", lambda found: names[found[0]], name)
                tensors[renamed.replace(".mlp.", ".ffn.")] = tensor
        safetensors.save_file(tensors, path)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    """With executables that are on this machine in place of those that are not."""
    unit = (EXAMPLES / "server" / "ep2tp-vllm.service").read_text(encoding="utf-8")
    (tmp_path / "ep2tp-vllm.service").write_text(re.sub(r"/opt/vllm/bin/\w+", "/bin/true", unit))
    done = run("systemd-analyze", "verify", "--man=no", tmp_path / "ep2tp-vllm.service")
    assert done.returncode == 0, done.stderr
    assert "ep2tp-vllm" not in done.stdout + done.stderr  # nor a warning about it


def test_the_container_has_a_checked_engine_and_this_version() -> None:
    text = (EXAMPLES / "server" / "Containerfile").read_text(encoding="utf-8")
    [engine] = re.findall(r"^FROM \S+/vllm-openai:v(\S+)$", text, re.MULTILINE)
    assert engine in seams.VERSIONS
    assert set(re.findall(r"ep2tp-(\d[\d.]*)-py3", text)) == {__version__}


@pytest.mark.parametrize(("rank", "headless"), [(0, False), (1, True)])
def test_a_node_launches_its_part(rank: int, headless: bool, tmp_path: Path) -> None:
    """What is launched, read from a stand-in for the vllm command; tests/engines/test_vllm_serve.py runs a real one."""
    (tmp_path / "vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "vllm").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run(EXAMPLES / "multi_node.sh", rank, "10.0.0.1", "a model", "--port", "9", PATH=path, NODES="2", GPUS="8")
    words = done.stdout.splitlines()
    assert words[:2] == ["serve", "a model"]
    sizes = ["--node-rank", str(rank), "--master-addr", "10.0.0.1"]
    sizes += ["--tensor-parallel-size", "8", "--pipeline-parallel-size", "2"]
    assert words[4:12] == sizes
    assert words[12:] == ["--headless"] * headless + ["--port", "9"]
