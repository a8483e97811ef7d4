from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ep2tp.errors import GuardError
from ep2tp.rewrite import guard


@pytest.fixture
def fake_deep_ep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with importable packages named like the libraries."""
    for name in ("deep_ep", "nvshmem"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MAPPED = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    guard.disarm()
    for name in ("deep_ep", "nvshmem"):
        sys.modules.pop(name, None)


def test_guarded_imports_raise_an_error_that_names_ep2tp(fake_deep_ep: Path) -> None:
    assert guard.arm() == []
    with pytest.raises(GuardError, match=r"ep2tp keeps deep_ep from being imported.*EP2TP=off"):
        importlib.import_module("deep_ep")
    with pytest.raises(ImportError, match="ep2tp keeps nvshmem"):
        import nvshmem  # type: ignore[import-not-found]  # noqa: F401


def test_vllm_sees_a_guarded_library_as_not_available(fake_deep_ep: Path) -> None:
    utils = pytest.importorskip("vllm.utils.import_utils")
    utils._has_module.cache_clear()
    guard.arm()
    assert utils.has_deep_ep() is False
    utils._has_module.cache_clear()


def test_libraries_that_are_not_installed_are_just_not_found() -> None:
    guard.arm()
    assert importlib.util.find_spec("deep_ep") is None
    with pytest.raises(ModuleNotFoundError, match="No module named 'deep_ep'"):
        importlib.import_module("deep_ep")
    guard.disarm()


def test_disarming_lets_them_in(fake_deep_ep: Path) -> None:
    guard.arm()
    guard.disarm()
    assert importlib.import_module("deep_ep").MAPPED


def test_the_part_of_mori_that_moves_kv_caches_is_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("", "io", "ops"):
        (tmp_path / "mori" / part).mkdir()
        (tmp_path / "mori" / part / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    guard.arm()
    try:
        importlib.import_module("mori.io")
        with pytest.raises(GuardError, match=r"keeps mori\.ops from being imported"):
            importlib.import_module("mori.ops")
    finally:
        guard.disarm()
        for name in ("mori", "mori.io"):
            sys.modules.pop(name, None)


def test_libraries_imported_before_are_named(fake_deep_ep: Path) -> None:
    importlib.import_module("deep_ep")
    assert guard.arm() == ["deep_ep"]


def test_child_processes_inherit_the_guard(fake_deep_ep: Path) -> None:
    guard.arm()
    code = "from ep2tp.rewrite import guard; guard.arm_if_inherited(); import deep_ep"
    env = os.environ | {"PYTHONPATH": str(fake_deep_ep)}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert "ep2tp keeps deep_ep from being imported" in child.stderr


def test_mapped_libraries_leaves_out_those_of_torch(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    line = "7f0000000000-7f0000001000 r-xp 00000000 00:00 0 {}\n"
    paths = [
        "/usr/lib/libc.so.6",
        "/venv/torch/lib/libtorch_nvshmem.so",
        "/venv/nvidia/nvshmem/lib/libnvshmem_host.so.3",
        "/opt/deepep/libnvshmem_host.so.3",
        "/venv/deep_ep_cpp.cpython-311-x86_64-linux-gnu.so",
    ]
    maps.write_text("".join(line.format(path) for path in paths) + "7f00-7f01 rw-p 00000000 00:00 0\n")
    assert guard.mapped_libraries(str(maps)) == ["/opt/deepep/libnvshmem_host.so.3", paths[4]]


def test_this_process_maps_none() -> None:
    assert guard.mapped_libraries() == []
