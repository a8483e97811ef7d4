"""Which engines are installed, and whether ep2tp's seams hold in them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from ep2tp.doctor.finding import Finding, Level, isolated
from ep2tp.doctor.libraries import is_installed

CHECK = "engines"
_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
LIMIT_S = 120.0


def check_engines(limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """One finding for each engine, checked in a process that is ended after ``limit_s``."""
    installed = [name for name in _NAMES if is_installed(name)]
    for name in installed:
        yield from isolated(CHECK, partial(_checked, name, limit_s), f"the check of {_NAMES[name]}")
    if not installed:
        what = f"neither vLLM nor SGLang is installed beside {sys.executable}"
        why = "ep2tp works inside one of them; nothing of it can be checked"
        yield Finding(CHECK, Level.DEGRADED, what, why, "run this in the environment that serves")


def _checked(name: str, limit_s: float) -> Iterator[Finding]:
    yield _check(name, limit_s)


def _check(name: str, limit_s: float) -> Finding:
    title = _NAMES[name]
    if importlib.util.find_spec(f"ep2tp.engines.{name}.launch") is None:
        why = "ep2tp rewrite prints the tensor-parallel command for it"
        return Finding(CHECK, Level.NOTE, f"{title} is installed; this version of ep2tp has no plugin for it", why)
    command = [sys.executable, "-m", "ep2tp.doctor.seam_check", name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        what = f"{title} is installed, but importing it takes over {limit_s:.0f} s"
        return Finding(CHECK, Level.BLOCKED, what, "it cannot start")
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        what = f"{title} is installed, but cannot be imported: {reason}"
        return Finding(CHECK, Level.BLOCKED, what, "it cannot start")
    found = json.loads(run.stdout.splitlines()[-1])
    if found["problem"]:
        why = "ep2tp warns and leaves launches of this engine as they are"
        do = "use a version that ep2tp knows, or a newer ep2tp"
        return Finding(CHECK, Level.DEGRADED, f"{title} {found['version']}: {found['problem']}", why, do)
    return Finding(CHECK, Level.OK, f"{title} {found['version']}: a version that ep2tp knows, and its seams hold")
