"""What a stranger gets: the wheel alone in a fresh environment, and the demo run from it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

from ep2tp import __version__
from ep2tp.demo.tiny import TinyModel

ROOT = Path(__file__).parents[1]
VLLM = importlib.util.find_spec("vllm")
# Nothing of the checkout: not its folder, not what points to it.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME") and k[:5] != "EP2TP"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built out of it."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [found] = dist.glob("*.whl")
    return found


def run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def fresh_environment(folder: Path, *pip_arguments: str) -> Path:
    """Make a virtual environment without pip and install into it; returns its Python."""
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *pip_arguments], folder)
    return python


def test_metadata_is_what_an_index_takes(dist: Path) -> None:
    files = sorted(map(str, dist.iterdir()))
    assert len(files) == 2
    run([sys.executable, "-m", "twine", "check", "--strict", *files], dist)


def test_the_wheel_holds_all_data_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"ep2tp-{__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    package = ROOT / "ep2tp"
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert {str(path.relative_to(ROOT)) for path in files} == {name for name in names if name.startswith("ep2tp/")}
    assert {"ep2tp/py.typed", "ep2tp/patches/deepseek_v3.toml"} < names
    assert {name for name in names if not name.startswith("ep2tp/")} == {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    assert "[vllm.general_plugins]" in entry_points
    assert "[sglang.srt.plugins]" in entry_points
    assert metadata["License-Expression"] == "Apache-2.0"
    # An engine's own environment must not change because ep2tp comes into it.
    required = {str(line).split(">")[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert not required & {"torch", "vllm", "sglang", "transformers", "triton"}


def test_the_sdist_holds_what_its_tests_need(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("tests/data/models.json", "examples/reshard_and_serve.py", "docs/seams.md", "CHANGELOG.md", ".ci/run")
    assert names.issuperset(needed)
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def test_the_wheel_alone_lists_patches_and_plans_a_model(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "alone", str(wheel))
    ep2tp = str(python.with_name("ep2tp"))
    place = run([str(python), "-c", "import ep2tp; print(ep2tp.__file__)"], tmp_path)
    assert place.startswith(str(tmp_path / "alone"))
    (tmp_path / "config.json").write_text(json.dumps(TinyModel(heads=16).config()))

    assert run([ep2tp, "--version"], tmp_path).strip() == f"ep2tp, version {__version__}"
    assert "Commands:" in run([ep2tp, "--help"], tmp_path)
    assert "DeepseekV3ForCausalLM" in run([ep2tp, "patches"], tmp_path)
    # --link host reads the measurements that lie in the package
    link = ["--gpus", "2", "--gpu", "RTX PRO 6000", "--link", "host"]
    planned = json.loads(run([ep2tp, "plan", str(tmp_path), *link, "--json"], tmp_path))
    assert {plan["plan"] for plan in planned["plans"]} >= {"TP", "TEP", "DEP"}
    rewritten = run([ep2tp, "rewrite", "--", "vllm", "serve", str(tmp_path), "-dp", "2", "-ep"], tmp_path)
    assert rewritten == f"vllm serve {tmp_path} --tensor-parallel-size 2\n"


@pytest.mark.engine
@pytest.mark.skipif(VLLM is None, reason="needs vLLM")
def test_the_demo_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """vLLM and its packages are those of this environment; ep2tp and its entry points are the wheel's."""
    python = fresh_environment(tmp_path / "demo", "--no-deps", "--no-index", str(wheel))
    [site_packages] = (tmp_path / "demo").glob("lib/python*/site-packages")
    # A folder that a .pth names is searched last, and the .pth files in it (an editable ep2tp) are not followed.
    (site_packages / "engine.pth").write_text(f"{Path(str(VLLM and VLLM.origin)).parents[1]}\n")
    code = """
from importlib.metadata import distribution, entry_points
import ep2tp
[plugin] = entry_points(group="vllm.general_plugins", name="ep2tp")
print(ep2tp.__file__, plugin.load().__code__.co_filename, plugin.dist.locate_file(""), sep="\\n")
"""
    assert all(line.startswith(str(site_packages)) for line in run([str(python), "-c", code], tmp_path).splitlines())
    shown = run([str(python.with_name("ep2tp")), "demo"], tmp_path)
    assert "Tokens of one rank and of the rewritten launch: equal" in shown
    assert shown.rstrip().endswith("OK")
