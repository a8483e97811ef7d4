"""``ep2tp doctor`` as a command: its outcome, its cache, and how it reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from ep2tp.cli import main
from ep2tp.doctor import cache
from ep2tp.doctor import examine as examined
from ep2tp.doctor.examine import examine
from ep2tp.doctor.finding import Finding, Level, verdict
from ep2tp.doctor.gpus import check_gpus
from ep2tp.doctor.links import check_links
from ep2tp.doctor.machine import Machine
from ep2tp.doctor.report import print_report
from ep2tp.doctor.transfers import Proof
from tests.doctor.machines import BROKEN, PROVEN, machine

FAILED = Proof({}, {}, "libcuda.so.1 cannot be loaded")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No engine is imported, and the cache is the test's own."""
    monkeypatch.setattr("ep2tp.doctor.examine.check_engines", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def use_probe(monkeypatch: pytest.MonkeyPatch, proof: Proof) -> list[int]:
    """Prove ``proof`` for every pair; returns a list that gets an entry for each probing."""
    probed: list[int] = []

    def prove(subject: Machine) -> list[Proof]:
        probed.append(len(subject.pairs))
        return [proof] * len(subject.pairs)

    monkeypatch.setattr(cache, "prove", prove)
    return probed


@pytest.mark.parametrize(
    ("subject", "proof", "expected"),
    [
        (machine(4), PROVEN, "ready"),
        (machine(4), BROKEN, "blocked"),
        (machine(4, pcie_width=8), PROVEN, "degraded"),
        (Machine(problem="NVML Shared Library Not Found"), PROVEN, "degraded"),
    ],
)
def test_the_verdict(
    subject: Machine, proof: Proof, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_probe(monkeypatch, proof)
    monkeypatch.setattr("ep2tp.doctor.examine.check_shared_memory", lambda _: [])
    assert verdict(list(examine(subject, None, False, tmp_path))) == expected


CHECKS = [name for name in vars(examined) if name.startswith("check_")]


@pytest.mark.parametrize("broken", CHECKS)
def test_a_check_that_breaks_off_loses_no_other_finding(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(name: str) -> Callable[..., Iterator[Finding]]:
        def check(*_: object) -> Iterator[Finding]:
            yield Finding(name, Level.OK, "found")
            if name == broken:
                raise PermissionError(13, "Permission denied", "/sys/device")

        return check

    use_probe(monkeypatch, PROVEN)
    for name in CHECKS:
        monkeypatch.setattr(examined, name, one(name))
    findings = list(examine(machine(2), None, False))
    assert sorted(finding.check for finding in findings if finding.what == "found") == sorted(CHECKS)
    [unchecked] = [finding for finding in findings if finding.what != "found"]
    assert unchecked.level is Level.UNCHECKED
    assert "broke off: PermissionError: [Errno 13] Permission denied: '/sys/device'" in unchecked.what


def test_a_probe_that_breaks_off_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def prove(subject: Machine) -> list[Proof]:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(cache, "prove", prove)
    found = {finding.check: finding for finding in examine(machine(2), None, False) if finding.level is not Level.NOTE}
    assert found["P2P"].level is found["custom all-reduce"].level is Level.UNCHECKED
    assert "not proven: OSError: [Errno 12] Cannot allocate memory" in found["P2P"].what
    assert found["GPUs"].level is Level.OK


def test_what_was_proven_is_kept_for_these_gpus_and_this_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = use_probe(monkeypatch, BROKEN)
    first, second, other = machine(2), machine(2), machine(2, uuid="GPU-x")
    assert cache.proofs_of(first, is_fresh=False) == ([BROKEN], False)
    assert cache.proofs_of(second, is_fresh=False) == ([BROKEN], True)
    assert len(probed) == 1
    assert cache.proofs_of(other, is_fresh=False) == ([BROKEN], False)
    assert cache.proofs_of(Machine("", "590.1", "13.1", first.gpus, first.pairs), is_fresh=False)[1] is False
    assert cache.proofs_of(first, is_fresh=True)[1] is False
    assert len(probed) == 4


def test_a_probe_that_could_not_run_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_probe(monkeypatch, FAILED)
    assert cache.proofs_of(machine(2), is_fresh=False)[1] is False
    assert cache.proofs_of(machine(2), is_fresh=False)[1] is False


def test_a_broken_cache_and_a_home_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_probe(monkeypatch, PROVEN)
    cache.proofs_of(machine(2), is_fresh=False)
    [kept] = (tmp_path / "cache/ep2tp").iterdir()
    kept.write_text('[{"proven": 3')
    assert cache.proofs_of(machine(2), is_fresh=False) == ([PROVEN], False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache.proofs_of(machine(2), is_fresh=False) == ([PROVEN], False)


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    use_probe(monkeypatch, BROKEN)
    monkeypatch.setattr("ep2tp.doctor.machine.read_machine", lambda: machine(2))
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 2
    value: dict[str, Any] = json.loads(result.stdout)
    assert value["verdict"] == "blocked"
    assert {"check", "level", "what", "why", "do"} == value["findings"][0].keys()
    assert Machine.from_json(value["machine"]) == machine(2)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "data" / "machines").glob("*.json")), ids=str)
def test_a_recorded_machine_gives_the_findings_it_gave(path: Path) -> None:
    """What ``ep2tp doctor --json`` printed on a real machine (``tests/gpu/test_doctor.py`` writes it)."""
    recorded = json.loads(path.read_text())
    subject = Machine.from_json(recorded["machine"])
    expected = [Finding(**finding) for finding in recorded["findings"] if finding["check"] in ("GPUs", "links")]
    assert [*check_gpus(subject, Path("/")), *check_links(subject)] == expected


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits_and_says_all(width: int) -> None:
    finding = Finding(
        "P2P", Level.BLOCKED, "bytes [0] are wrong " * 9, "it matters " * 20, "do NCCL_P2P_DISABLE=1 " * 9
    )
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    print_report([finding, Finding("GPUs", Level.OK, "4 x NVIDIA RTX PRO 6000")], console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert words.count("bytes [0] are wrong") == 9
    assert words.count("it matters") >= 20
    assert words.count("NCCL_P2P_DISABLE=1") == 9
    assert "BLOCKED (1 blocked, 0 degraded, 1 ok)" in words


def test_the_real_command_on_this_machine_without_an_engine(tmp_path: Path) -> None:
    """In an interpreter that sees no engine: ``-S`` and a path with ep2tp's dependencies would; a stub import does."""
    script = (
        "import sys, ep2tp.doctor.engines as e; e.is_installed = lambda name: False\n"
        "from ep2tp.cli import main; main(['doctor'])"
    )
    environment = os.environ | {"COLUMNS": "80", "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode in (0, 1, 2)
    assert "neither vLLM nor SGLang is installed" in " ".join(run.stdout.split())
    assert "not checked" in run.stdout
    assert "\x1b" not in run.stdout
    assert "Traceback" not in run.stderr
