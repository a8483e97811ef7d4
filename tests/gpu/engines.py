"""Runs vLLM engines in processes of their own, several at a time, and compares the logits that they saved."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from case_queue import CaseQueue

from ep2tp.demo.launch import run_logged

HERE = Path(__file__).parent
JOBS = int(os.environ.get("GPU_TEST_JOBS", "2"))
SECONDS = float(os.environ.get("GPU_TEST_SECONDS", "1500"))  # for all engines together
_ONE_ENGINE = 170.0
_TRITON = {"moe_backend": "triton"}
NO_PLUGINS = "absent"
"""As :attr:`Case.ep2tp`: vLLM loads no plugin at all, as if ep2tp were not installed."""


@dataclass(frozen=True)
class Case:
    """One engine to start.

    Attributes:
        name: of its log and result files.
        checkpoint: name of a checkpoint folder.
        ranks: tensor-parallel size.
        ep: start it as expert-parallel recipes do, with --enable-expert-parallel.
        ep2tp: the value of ``EP2TP``, or :data:`NO_PLUGINS`.
        kernel: the value of ``EP2TP_KERNEL``.
        engine: further arguments of ``vllm.LLM``.
        update: name of a checkpoint folder whose weights it is given in place before it generates.
        fails: whether it is expected not to start.
    """

    name: str
    checkpoint: str
    ranks: int = 1
    ep: bool = False
    ep2tp: str = "off"
    kernel: str = "engine"
    engine: Mapping[str, Any] = field(default_factory=dict)
    update: str | None = None
    fails: bool = False


@dataclass(frozen=True)
class Run:
    """What came of a case: the exit status, the whole log, and its result if it generated."""

    case: Case
    status: int
    log: str
    result: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Tokens, timings, and each rank from inside."""
        assert self.status == 0, f"{self.case.name} failed ({self.status}):\n{self.log[-4000:]}"
        return json.loads(self.result.with_suffix(".json").read_text())

    @cached_property
    def logits(self) -> np.ndarray:
        """[prompt, step, token]."""
        return np.load(self.result.with_suffix(".npz"))["logits"]


class Engines:
    """Starts the cases some at a time, from the first on that is asked for."""

    def __init__(self, cases: list[Case], checkpoints: Mapping[str, Path], logs: Path, gpus: int) -> None:
        self._logs, self._checkpoints, self._gpus = logs, checkpoints, gpus
        self._deadline = time.monotonic() + SECONDS
        self._queue = CaseQueue({case.name: case for case in cases}, self._run, JOBS)

    def __getitem__(self, name: str) -> Run:
        """The finished run of a case."""
        return self._queue[name]

    def close(self) -> None:
        """Start no further case; those that run come to their end."""
        self._queue.close()

    def _run(self, case: Case) -> Run:
        run = self._attempt(case, 1, {})
        if run.status and not case.fails:  # some builds lack a kernel that vLLM picks by itself
            run = self._attempt(case, 2, {"attention_backend": self._portable_attention(case)})
        return run

    def _attempt(self, case: Case, attempt: int, fallback: Mapping[str, Any]) -> Run:
        result = self._logs / case.name
        log = self._logs / f"{case.name}.{attempt}.log"
        left = min(_ONE_ENGINE, self._deadline - time.monotonic())
        command = self._command(case, result, fallback)
        environment = os.environ | _environment(case)
        if attempt > 1:
            environment["SHARED_GPU_STAGING"] = "torch"
        status = run_logged(command, environment, log, left) if left > 0 else -1
        return Run(case, status, log.read_text(errors="replace") if log.exists() else "no time left", result)

    def _portable_attention(self, case: Case) -> str:
        uses_mla = "kv_lora_rank" in (self._checkpoints[case.checkpoint] / "config.json").read_text()
        return "TRITON_MLA" if uses_mla else "TRITON_ATTN"

    def _command(self, case: Case, result: Path, fallback: Mapping[str, Any]) -> list[str]:
        command = [sys.executable, str(HERE / "generate.py"), str(self._checkpoints[case.checkpoint]), str(result)]
        command += ["--tp", str(case.ranks), "--engine", json.dumps({**_TRITON, **case.engine, **fallback})]
        if case.ep:
            command.append("--ep")
        if case.update:
            command += ["--update", str(self._checkpoints[case.update])]
        if case.ranks > self._gpus:
            command.append("--shared-gpu")
        return command


def _environment(case: Case) -> dict[str, str]:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **({"VLLM_PLUGINS": ""} if case.ep2tp == NO_PLUGINS else {"EP2TP": case.ep2tp, "EP2TP_KERNEL": case.kernel}),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the same runner for every model
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@dataclass(frozen=True)
class Agreement:
    """How near two runs' logits are, over every step up to and including the first at which their tokens differ.

    Attributes:
        steps, compared: steps generated, and steps of the same context.
        same_tokens: the share of compared steps with the same most likely token.
        largest, mean: absolute difference of a logit.
        relative: over steps, quantiles 0.5, 0.9 and 1.0 of ``|a - b| / |a|`` (Euclidean, logits centred).
        identical: whether all compared logits are the same numbers.
    """

    steps: int
    compared: int
    same_tokens: float
    largest: float
    mean: float
    relative: tuple[float, float, float]
    identical: bool

    def __str__(self) -> str:
        """One line for a log."""
        median, most, worst = self.relative
        return (
            f"identical={self.identical} tokens={self.same_tokens:.1%} ({self.compared}/{self.steps} steps compared) "
            f"|d| max={self.largest:.4g} mean={self.mean:.4g} relative p50={median:.4g} p90={most:.4g} max={worst:.4g}"
        )


def agreement(a: Run, b: Run) -> Agreement:
    """Compare two runs of the same prompts."""
    rows_a, rows_b, same = [], [], []
    steps = 0
    for i, (left, right) in enumerate(zip(a.facts["tokens"], b.facts["tokens"], strict=True)):
        steps += len(left)
        for step, (x, y) in enumerate(zip(left, right, strict=True)):
            rows_a.append(a.logits[i, step])
            rows_b.append(b.logits[i, step])
            same.append(x == y)
            if x != y:
                break
    left_rows, right_rows = np.stack(rows_a).astype(np.float64), np.stack(rows_b).astype(np.float64)
    difference = np.abs(left_rows - right_rows)
    assert np.isfinite(difference).all(), "logits are not finite"
    centred = left_rows - left_rows.mean(axis=1, keepdims=True)
    relative = np.linalg.norm(difference, axis=1) / np.linalg.norm(centred, axis=1)
    quantiles = tuple(float(q) for q in np.quantile(relative, (0.5, 0.9, 1.0)))
    return Agreement(
        steps, len(same), float(np.mean(same)), float(difference.max()), float(difference.mean()), quantiles,
        bool((left_rows == right_rows).all()),
    )  # fmt: skip


def errors(log: str) -> list[str]:
    """The distinct error messages of a log, from its tracebacks, without process prefixes."""
    return list(dict.fromkeys(re.findall(r"\b(?:\w+Error|Exception): .*", log)))
