"""Runs :mod:`ep2tp.demo.generate` as a child process with a time limit and a log file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# vLLM on a small CPU: 1 GiB of KV cache, no thread pinning, one thread a rank.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# What tells most about a failure, best first: the engine's own summary names no cause.
_FAILURES = (
    r"Segfault encountered",  # printed by vLLM's CPU kernels
    r"Worker proc .* died unexpectedly \(exit code: -?\d+\)",
    r"\bassert .*",
    r"\w+Error: (?!Engine core|Tokenizer).*",
    r"\w+Error: .*",
)
PROMPTS = [[3, 5, 7, 11, 13], [100, 200, 300], [42], [9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 11, 12]]


@dataclass(frozen=True)
class EngineRun:
    """One finished engine run.

    Attributes:
        returncode: exit status; negative for a signal.
        result: what :func:`ep2tp.demo.generate.generate` returned, or None where the run failed.
        log: all that the engine printed.
        seconds: wall-clock time, start of the engine included.
    """

    returncode: int
    result: dict[str, Any] | None
    log: str
    seconds: float

    @property
    def ep2tp_lines(self) -> list[str]:
        """What ep2tp wrote to the engine's log, without the engine's line prefixes."""
        return re.findall(r"INFO .*\[plugin\.py:\d+\] (.*)", self.log)

    @property
    def failure(self) -> str:
        """The reason of a failed run in one line."""
        if self.returncode < 0:
            return f"killed by {signal.Signals(-self.returncode).name}"
        for pattern in _FAILURES:
            if found := re.search(pattern, self.log):
                return found.group().strip()
        return f"exit status {self.returncode}"


def run_engine(
    folder: Path, name: str, engine: dict[str, Any], mode: str, max_tokens: int = 12, limit_s: int = 300
) -> EngineRun:
    """Run one engine on :data:`PROMPTS`.

    Args:
        folder: where the request, the result and the log go.
        name: what their names begin with.
        engine: keyword arguments of ``vllm.LLM``.
        mode: ``EP2TP`` of the run.
        max_tokens: tokens to generate for each prompt.
        limit_s: seconds after which the run is killed.
    """
    request, result, log = (folder / f"{name}.{kind}" for kind in ("request.json", "result.json", "log"))
    request.write_text(json.dumps({"engine": engine, "prompts": PROMPTS, "max_tokens": max_tokens}), encoding="utf-8")
    result.unlink(missing_ok=True)
    environment = os.environ | CPU_ENVIRONMENT | {"EP2TP": mode}
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "ep2tp.demo.generate", str(request), str(result)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            returncode = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            returncode = -signal.SIGKILL
        finally:
            _end_group(process)
    seconds = time.monotonic() - started
    text = log.read_text(encoding="utf-8", errors="replace")
    found = json.loads(result.read_text(encoding="utf-8")) if returncode == 0 and result.is_file() else None
    return EngineRun(returncode, found, text, seconds)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End workers that a crashed engine leaves behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
