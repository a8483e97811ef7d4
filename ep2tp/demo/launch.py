"""Runs an engine in a child process, with a time limit and a log file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep2tp.demo.engines import VLLM, DemoEngine

STARTS = 3  # of an engine, where a port that was free is another program's by the time it is bound
PROMPTS = [[3, 5, 7, 11, 13], [100, 200, 300], [42], [9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 11, 12]]


@dataclass(frozen=True)
class EngineRun:
    """One finished engine run.

    Attributes:
        returncode: exit status; negative for a signal.
        result: what its ``generate`` returned, or None where the run failed.
        log: all that the engine printed.
        seconds: wall-clock time, start of the engine included.
        engine: what was run.
    """

    returncode: int
    result: dict[str, Any] | None
    log: str
    seconds: float
    engine: DemoEngine

    @property
    def ep2tp_lines(self) -> list[str]:
        """What ep2tp wrote to the engine's log, without the engine's line prefixes."""
        return self.engine.report(self.log)

    @property
    def failure(self) -> str:
        """The reason of a failed run in one line."""
        for pattern in self.engine.failures:
            if found := re.search(pattern, self.log):
                return found.group().strip()
        if self.returncode < 0:
            return f"killed by {signal.Signals(-self.returncode).name}"
        return f"exit status {self.returncode}"


def says_port_is_taken(log: str) -> bool:
    """Whether asyncio, torch, ZeroMQ or SGLang says so somewhere."""
    return re.search(r"(address|port) .*in use", log, re.IGNORECASE) is not None


def run_engine(
    folder: Path,
    name: str,
    options: dict[str, Any],
    mode: str,
    engine: DemoEngine = VLLM,
    max_tokens: int = 12,
    limit_s: int = 300,
) -> EngineRun:
    """Run one engine on :data:`PROMPTS`; anew where a port was taken.

    Args:
        folder: where the request, the result and the log go.
        name: what their names begin with.
        options: the engine's own arguments, the model's folder among them.
        mode: ``EP2TP`` of the run.
        engine: what to run.
        max_tokens: tokens to generate for each prompt.
        limit_s: seconds after which the run is killed.
    """
    request, result, log = (folder / f"{name}.{kind}" for kind in ("request.json", "result.json", "log"))
    asked = {"engine": options, "prompts": PROMPTS, "max_tokens": max_tokens}
    request.write_text(json.dumps(asked), encoding="utf-8")
    result.unlink(missing_ok=True)
    environment = os.environ | dict(engine.environment) | {"EP2TP": mode}
    command = [sys.executable, "-m", engine.module, str(request), str(result)]
    for _ in range(STARTS):
        started = time.monotonic()
        returncode = run_logged(command, environment, log, limit_s)
        seconds = time.monotonic() - started
        text = log.read_text(encoding="utf-8", errors="replace")
        if returncode == 0 or not says_port_is_taken(text):
            break
    found = json.loads(result.read_text(encoding="utf-8")) if returncode == 0 and result.is_file() else None
    return EngineRun(returncode, found, text, seconds, engine)


def run_logged(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> int:
    """Run a command with all that it starts, for so many seconds at most; its output goes to ``log``.

    Returns:
        Its exit status, ``-SIGKILL`` where it took too long. Workers that a crashed engine leaves behind are ended.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
