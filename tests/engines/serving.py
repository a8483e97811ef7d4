"""Servers of an engine on this machine: started, asked for tokens, ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


class Server:
    """Processes that make up one server, one a node, each with a log; the first answers on ``port``."""

    def __init__(self, commands: Mapping[Path, Sequence[str]], port: int, environment: Mapping[str, str]) -> None:
        self.url, self.logs = f"http://127.0.0.1:{port}", list(commands)
        self.processes = []
        for log, command in commands.items():
            with log.open("wb") as stream:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env=os.environ | dict(environment),
                        start_new_session=True,
                    )
                )

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy tokens, by vLLM's endpoint for token ids."""
        self._wait_until_healthy()
        sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
        answer = json.loads(
            ask(f"{self.url}/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling})
        )
        return list(answer["choices"][0]["token_ids"])

    def stop(self) -> str:
        """End all processes; returns what they logged."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def _wait_until_healthy(self) -> None:
        for _ in range(240):
            assert self.processes[0].poll() is None, self.logs[0].read_text()[-3000:]
            try:
                ask(f"{self.url}/health")
            except OSError:
                time.sleep(1)
            else:
                return
        raise AssertionError(self.logs[0].read_text()[-3000:])
