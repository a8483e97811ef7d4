"""Servers: over real HTTP, with answers of the shape that engines give."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ep2tp.errors import SourceError
from ep2tp.observe.evidence import Plan
from ep2tp.observe.source import read_source
from ep2tp.observe.verdict import judge

VLLM = {"tensor_parallel_size": 2, "data_parallel_size": 1, "prefill_context_parallel_size": 1}


@contextmanager
def serving(answers: dict[str, Any], status: int = 404) -> Iterator[str]:
    """A server that has ``answers`` by path, and ``status`` for all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = answers.get(self.path.partition("?")[0])
            self.send_response(status if found is None else 200)
            self.end_headers()
            self.wfile.write(found if isinstance(found, bytes) else json.dumps(found).encode())

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({"enable_expert_parallel": False}, "TP"),
        ({"enable_expert_parallel": True}, "TEP"),
        ({"enable_expert_parallel": True, "data_parallel_size": 2}, "DEP"),
        ({"enable_expert_parallel": False, "data_parallel_size": 2}, "mixed"),
        ({"enable_expert_parallel": True, "all2all_backend": "passthrough"}, "DEP"),
    ],
)
def test_vllm_in_development_mode(changes: dict[str, Any], plan: str) -> None:
    with serving({"/server_info": {"vllm_config": {"parallel_config": VLLM | changes}}}) as url:
        verdict = judge(read_source(f"{url}/v1/"))
    assert (verdict.plan.value, verdict.engine, verdict.confidence) == (plan, "vllm", "high")


@pytest.mark.parametrize("parallel", [None, [], {"tensor_parallel_size": "two"}, {"tensor_parallel_size": [2]}])
def test_sizes_of_another_kind_are_refused(parallel: Any) -> None:
    with (
        serving({"/server_info": {"vllm_config": {"parallel_config": parallel}}}) as url,
        pytest.raises(SourceError, match="tells no parallel sizes"),
    ):
        list(read_source(url))


@pytest.mark.parametrize("size", ["two", [2], 2.5, -2])
def test_sglangs_sizes_of_another_kind_tell_nothing(size: Any) -> None:
    with serving({"/server_info": {"tp_size": size}}) as url:
        assert judge(read_source(url)).plan is Plan.UNKNOWN


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_sglang(path: str) -> None:
    info = {"tp_size": 4, "ep_size": 4, "moe_a2a_backend": "none", "attn_dp_size": 1, "version": "0.5.23"}
    with serving({path: info}) as url:
        verdict = judge(read_source(url))
    assert (verdict.plan, verdict.engine) == (Plan.TEP, "sglang")


@pytest.mark.parametrize(
    ("fingerprint", "plan"),
    [
        ("vllm-0.32.0-tp2-0715ef1e", "TP"),  # seen
        ("vllm-0.33.0-tp4-ep-0a1b2c3d", "TEP"),
        ("vllm-0.33.0-tp2-dp2-ep-nohash", "DEP"),
        ("vllm-0.32.0+cpu-0a1b2c3d", "TP"),
        ("vllm-0.33.0-0a1b2c3d-and-more", "unknown"),
        ("my own words", "unknown"),
        (None, "unknown"),
    ],
)
def test_vllms_fingerprint(fingerprint: str | None, plan: str) -> None:
    completion = {"system_fingerprint": fingerprint, "choices": []}
    with serving({"/v1/models": {"data": [{"id": "m"}]}, "/v1/completions": completion}) as url:
        assert judge(read_source(url)).plan.value == plan


def test_servers_that_tell_nothing() -> None:
    with serving({}) as url, pytest.raises(SourceError, match="answers neither"):
        list(read_source(url))
    with serving({"/server_info": b"<html>"}) as url, pytest.raises(SourceError, match="answers neither"):
        list(read_source(url))
    with serving({}, status=401) as url, pytest.raises(SourceError, match="wants an API key"):
        list(read_source(url))
    with serving({}) as url:
        gone = url
    with pytest.raises(SourceError, match="no server answers"):
        list(read_source(gone))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what answers there does not speak HTTP .BadStatusLine: SSH-2.0"),
        (b"", "no server answers .Remote end closed"),
    ],
)
def test_a_port_that_does_not_speak_http(answer: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as connection:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):  # a socket closed on unread bytes would reset the connection
                    pass

        threading.Thread(target=greet, daemon=True).start()
        port = server.getsockname()[1]
        with pytest.raises(
            SourceError, match=f"127.0.0.1:{port}: (what answers there does not speak|no server answers)"
        ):
            list(read_source(f"http://127.0.0.1:{port}"))
