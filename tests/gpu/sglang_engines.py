"""Runs SGLang engines in processes of their own, several at a time, and compares what they saved."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from case_queue import CaseQueue

from ep2tp.demo.launch import run_logged

HERE = Path(__file__).parent
JOBS = int(os.environ.get("GPU_TEST_JOBS", "3"))
ONE_ENGINE = 200.0  # seconds; the first one builds kernels
_PORTS_APART = 200


@dataclass(frozen=True)
class Case:
    """One engine to start.

    Attributes:
        name: of its log and result files.
        checkpoint: name of a checkpoint folder.
        arguments: of ``sglang.Engine``.
        ep2tp: the value of ``EP2TP``.
        kernel: the value of ``EP2TP_KERNEL``.
        gpu: the GPU of a case of one rank, where there are so many.
    """

    name: str
    checkpoint: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    ep2tp: str = "off"
    kernel: str = "engine"
    gpu: int = 0

    @property
    def ranks(self) -> int:
        """GPUs that it needs."""
        return int(self.arguments.get("tp_size", 1))


@dataclass(frozen=True)
class Run:
    """What came of a case."""

    name: str
    status: int
    log: str
    result: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Tokens, log-probabilities, and what the server was resolved to."""
        assert self.status == 0, f"{self.name} failed ({self.status}):\n{self.log[-4000:]}"
        return dict(json.loads(self.result.read_text()))


class Engines:
    """Starts the cases that fit this machine: the first one alone, then some at a time."""

    def __init__(self, cases: list[Case], folder: Path, logs: Path, first_port: int) -> None:
        self._folder, self._logs, self._gpus = folder, logs, torch.cuda.device_count()
        self._ports = {case.name: first_port + _PORTS_APART * i for i, case in enumerate(cases)}
        first, *rest = [case for case in cases if case.ranks <= self._gpus]
        self._first = self._run(first)  # builds the kernels
        self._queue = CaseQueue({case.name: case for case in rest}, self._run, JOBS)

    def __getitem__(self, name: str) -> Run:
        """The finished run of a case; skips the test where it needs more GPUs."""
        if name == self._first.name:
            return self._first
        if name not in self._queue:
            pytest.skip("needs two GPUs")
        return self._queue[name]

    def close(self) -> None:
        """Start no further case; those that run come to their end."""
        self._queue.close()

    def _run(self, case: Case) -> Run:
        result, log = self._logs / f"{case.name}.json", self._logs / f"{case.name}.log"
        place = {"base_gpu_id": min(case.gpu, self._gpus - 1), "port": self._ports[case.name]}
        command = [sys.executable, str(HERE / "sglang_generate.py"), str(self._folder / case.checkpoint), str(result)]
        command += ["--engine", json.dumps({**case.arguments, **place, "dtype": "bfloat16"})]
        settings = {"EP2TP": case.ep2tp, "EP2TP_KERNEL": case.kernel, "PYTHONUNBUFFERED": "1"}
        status = run_logged(command, os.environ | settings, log, ONE_ENGINE)
        if result.exists() and "GENERATED" in log.read_text(errors="replace"):
            status = 0  # SGLang ends its own process group when it shuts down
        return Run(case.name, status, log.read_text(errors="replace"), result)


def distance(a: Run, b: Run) -> dict[str, Any]:
    """How near two runs are, over every step up to and including the first at which their tokens differ."""
    differences, same, steps = [], [], 0
    for prompt, (left, right) in enumerate(zip(a.facts["tokens"], b.facts["tokens"], strict=True)):
        steps += len(left)
        for step, (x, y) in enumerate(zip(left, right, strict=True)):
            p, q = a.facts["logprobs"][prompt][step], b.facts["logprobs"][prompt][step]
            differences += [abs(p[token] - q[token]) for token in p.keys() & q.keys()]
            same.append(x == y and p == q)
            if x != y:
                break
    return {
        "a": a.name,
        "b": b.name,
        "identical": all(same) and len(same) == steps,
        "same_tokens": a.facts["tokens"] == b.facts["tokens"],
        "compared": f"{len(same)}/{steps}",
        "mean_logprob_difference": sum(differences) / len(differences),
    }
