"""Servers whose port another program has taken meanwhile, and servers that end; without an engine."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ep2tp.demo.launch import says_port_is_taken
from tests.engines import serving
from tests.engines.serving import Server, free_port

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is bound, and at which nothing answers."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        yield other.getsockname()[1]


class Commands:
    """Python programs, one a node, each with a log of its number; ``ports`` are those of all starts."""

    def __init__(self, folder: Path, *programs: str) -> None:
        self.logs = {folder / f"{node}.log": program for node, program in enumerate(programs)}
        self.ports: list[int] = []

    def __call__(self, port: int) -> dict[Path, list[str]]:
        self.ports.append(port)
        return {log: [sys.executable, "-c", program, str(port)] for log, program in self.logs.items()}


def first_answer(commands: Commands) -> bytes:
    server = Server(commands, {})
    try:
        return server.ask_when_ready("/health")
    finally:
        server.stop()


def test_a_taken_port_is_given_up_for_another(tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [taken, free_port()]
    monkeypatch.setattr(serving, "free_port", iter(ports).__next__)
    commands = Commands(tmp_path, SERVER)
    assert first_answer(commands) == b"here"
    assert commands.ports == ports
    assert "in use" not in (tmp_path / "0.log").read_text()  # a start's log is its own


def test_ports_that_are_always_taken_end_in_the_servers_own_words(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "free_port", lambda: taken)
    commands = Commands(tmp_path, SERVER)
    with pytest.raises(AssertionError, match="Address already in use"):
        first_answer(commands)
    assert commands.ports == [taken] * 3


@pytest.mark.parametrize(
    "programs", [("exit('no such model')",), ("import time; time.sleep(600)", "exit('no such model')")]
)
def test_a_node_that_ends_for_another_reason_is_not_started_again(tmp_path: Path, programs: tuple[str, ...]) -> None:
    commands = Commands(tmp_path, *programs)
    with pytest.raises(AssertionError, match="no such model"):
        first_answer(commands)
    assert len(commands.ports) == 1


@pytest.mark.parametrize(
    ("said", "is_about_ports"),
    [
        ("OSError: [Errno 98] Address already in use", True),
        ("[Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use", True),
        ("code: -98, name: EADDRINUSE, message: address already in use", True),
        ("Port is already in use. dist_init_port=30001 port_base=30002", True),
        ("Address of node 0: 10.0.0.1\nthe triton backend is in use", False),
        ("No available memory for the cache blocks", False),
    ],
)
def test_what_engines_say_of_a_taken_port(said: str, is_about_ports: bool) -> None:
    assert says_port_is_taken(f"before\n{said}\nafter") == is_about_ports
