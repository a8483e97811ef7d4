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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ep2tp.demo.launch import STARTS, says_port_is_taken


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
    """Processes that make up one server, one a node, each with a log; the first answers on ``port``.

    A port that was free may be another program's when an engine binds it; the server is then started anew.

    Args:
        commands: the command of each process by its log, for the port that the server answers on. Called once a start,
            so that other ports, and files that a command writes, can be new ones.
        environment: variables beside this process's own.

    Attributes:
        url: of the server, since its last start.
        processes: likewise, by node.
        logs: likewise.
    """

    def __init__(self, commands: Callable[[int], Mapping[Path, Sequence[str]]], environment: Mapping[str, str]) -> None:
        self._commands, self._environment = commands, os.environ | dict(environment)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._start()

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy tokens, by vLLM's endpoint for token ids."""
        self.ask_when_ready("/health")
        sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
        body = {"token_ids": prompt, "sampling_params": sampling}
        return list(json.loads(ask(f"{self.url}/inference/v1/generate", body))["choices"][0]["token_ids"])

    def ask_when_ready(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The first answer.

        Raises:
            AssertionError: with the end of each log, where a process ends, or none answers in four minutes.
        """
        starts = 1
        while (answer := self._first_answer(path, body)) is None:
            log = self.stop()
            assert starts < STARTS and says_port_is_taken(log), self._log_ends()
            self._start()
            starts += 1
        return answer

    def stop(self) -> str:
        """End all processes; returns what they logged since the last start."""
        while self.processes:
            process = self.processes.pop()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def _start(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        commands = self._commands(self.port)
        self.logs = list(commands)
        for log, command in commands.items():
            with log.open("wb") as stream:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env=self._environment,
                        start_new_session=True,
                    )
                )

    def _first_answer(self, path: str, body: dict[str, Any] | None) -> bytes | None:
        """None where a process ends before."""
        for _ in range(240):
            if any(process.poll() is not None for process in self.processes):
                return None
            try:
                return ask(self.url + path, body)
            except OSError:
                time.sleep(1)
        raise AssertionError(self._log_ends())

    def _log_ends(self) -> str:
        return "\n".join(f"{log.name}: ...{log.read_text(errors='replace')[-3000:]}" for log in self.logs)
