"""A model on a hub: a small local server that speaks as much of the hub's protocol as huggingface_hub asks for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from tests.checkpoint.checkpoints import Model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = """
import sys, threading, time
from pathlib import Path
from ep2tp.checkpoint.reshard import reshard
peak, out = [0], Path(sys.argv[1])
def watch():
    while True:
        peak[0] = max(peak[0], len([p for p in out.rglob("*.safetensors") if "/.ep2tp/fetch-" in str(p)]))
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
result = reshard("lab/model", out, tp=4, stream=sys.argv[2] == "stream", revision="v1")
print(result.status, peak[0])
"""


class Hub(BaseHTTPRequestHandler):
    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/lab/model"):
            files = sorted(p for p in self.folder.rglob("*") if p.is_file())
            siblings = [{"rfilename": str(p.relative_to(self.folder)), "size": p.stat().st_size} for p in files]
            entries = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0"} for f in siblings]
            body: object = {"id": "lab/model", "modelId": "lab/model", "sha": COMMIT, "siblings": siblings}
            body = entries if "/tree/" in path else body
            self.reply(200, json.dumps(body).encode(), with_body)
            return
        name = re.fullmatch(rf"/lab/model/resolve/{COMMIT}/(.+)", path)
        file = self.folder / name[1] if name else None
        if file is None or not file.is_file():
            self.reply(404, b"", with_body)
            return
        data = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = data[int(span[1]) : int(span[2]) + 1 if span[2] else None] if span else data
        self.reply(206 if span else 200, part, with_body)

    def reply(self, status: int, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json" if self.path.startswith("/api") else "application/octet")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{abs(hash(self.path.partition("?")[0])):x}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, type[Hub]]]:
    folder = Model("int4_g32", files=4).write(tmp_path_factory.mktemp("hub") / "model")
    handler = type("Served", (Hub,), {"folder": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


@pytest.mark.parametrize("way", ["stream", "cache"])
def test_hub_model(hub: tuple[str, type[Hub]], tmp_path: Path, way: str) -> None:
    address, handler = hub
    handler.requests.clear()
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-c", RUN, str(tmp_path / "out"), way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    status, most_at_once = done.stdout.split()
    assert status == "done"
    reshard(handler.folder, tmp_path / "local", tp=4)
    for path in (tmp_path / "local").glob("model*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    verify(tmp_path / "out")
    if way == "stream":
        assert int(most_at_once) <= 1
        manifest = json.loads((tmp_path / "out" / "ep2tp.json").read_text())
        assert manifest["source"] == {"repo": "lab/model", "revision": COMMIT}
        assert sum("/revision/v1" in request for request in handler.requests) == 1
        assert not list((tmp_path / "home").rglob("*.safetensors"))
