"""A model on a hub: a small local server that speaks as much of the hub's protocol as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from tests.checkpoint.checkpoints import Model
from tests.checkpoint.test_deepseek_parts import write as write_parts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = """
import json, os, sys
from contextlib import contextmanager
from pathlib import Path
from ep2tp.checkpoint.hub import HubSource
from ep2tp.checkpoint.reshard import reshard
peak, out, model, options = 0, Path(sys.argv[1]), sys.argv[3], json.loads(sys.argv[4])
kill, fetch = options.pop("kill", False), HubSource.fetch
@contextmanager
def counting(self, name):
    global peak
    with fetch(self, name) as path:
        files = [name for folder, _, names in os.walk(out / ".ep2tp") for name in names if "snapshots" in folder]
        peak = max(peak, len(files))
        yield path
HubSource.fetch = counting
config = next(iter(out.parent.glob("config.json")), None)
report = lambda done, total: os.kill(os.getpid(), 9) if kill else None
result = reshard(model, out, tp=4, stream=sys.argv[2] == "stream", revision="v1", config=config, report=report,
                 **options)
print(result.status, peak)
"""
VERIFY = """
import json, os, sys, tempfile
from pathlib import Path
from ep2tp.checkpoint import verify as module
from ep2tp.checkpoint.hub import HubSource
fetch, compare, places = HubSource.fetch, module.compare_tensor, set()
def counting(self, name):
    places.add(str(self._beside.parent.parent))
    return fetch(self, name)
def compared(*words):
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), 9)
    if sys.argv[3] == "wait":
        print("comparing", flush=True)
        sys.stdin.readline()
        sys.argv[3] = ""
    compare(*words)
HubSource.fetch, module.compare_tensor = counting, compared
found = module.verify(sys.argv[1], sys.argv[2], stream=True, revision="v1")
print(found.tensors, *places)
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the folders of a folder as the models of an owner called lab."""

    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if found := re.match(r"/api/models/lab/(\w+)", path):
            folder = self.folder / found[1]
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            siblings = [{"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size} for p in files]
            entries = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0"} for f in siblings]
            body: object = {"id": f"lab/{found[1]}", "sha": COMMIT, "siblings": siblings}
            body = entries if "/tree/" in path else body
            self.reply(200, json.dumps(body).encode(), with_body)
            return
        name = re.fullmatch(rf"/lab/(\w+)/resolve/{COMMIT}/(.+)", path)
        file = self.folder / name[1] / name[2] if name else None
        if file is None or not file.is_file():
            self.reply(404, b"", with_body)
            return
        data = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = data[int(span[1]) : int(span[2]) + 1 if span[2] else None] if span else data
        digest = hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else hashlib.sha1(data).hexdigest()
        self.reply(206 if span else 200, self.damaged(path, part), with_body, digest)

    def damaged(self, path: str, data: bytes) -> bytes:
        """A model called damaged has one wrong bit at the end of what is downloaded."""
        return data[:-1] + bytes([data[-1] ^ 1]) if "damaged" in path and path.endswith("safetensors") else data

    def reply(self, status: int, body: bytes, with_body: bool, etag: str = "0") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json" if self.path.startswith("/api") else "application/octet")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, type[Hub]]]:
    folder = tmp_path_factory.mktemp("hub")
    model = Model("int4_g32", files=4).write(folder / "model")
    (model / "pytorch_model.bin").write_bytes(b"never read")
    (model / "original").mkdir()
    shutil.copy(next(model.glob("*.safetensors")), model / "original" / "consolidated.safetensors")
    Model("int4_g32", files=1).write(folder / "damaged")
    write_parts(folder / "parts", 2)
    handler = type("Served", (Hub,), {"folder": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def convert(
    hub: tuple[str, type[Hub]], tmp_path: Path, way: str, model: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(tmp_path / "out"), way, model, json.dumps(options)]
    return subprocess.run(command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=120)


def environment(hub: tuple[str, type[Hub]], tmp_path: Path) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TMPDIR"} | {
        "HF_ENDPOINT": hub[0],
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def start_verify(hub: tuple[str, type[Hub]], tmp_path: Path, then: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", VERIFY, str(tmp_path / "out"), "lab/model", then]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(hub, tmp_path), text=True, **pipes)


@pytest.mark.parametrize("way", ["stream", "cache"])
def test_hub_model(hub: tuple[str, type[Hub]], tmp_path: Path, way: str) -> None:
    _, handler = hub
    handler.requests.clear()
    done = convert(hub, tmp_path, way, "lab/model")
    assert done.returncode == 0, done.stderr[-3000:]
    status, most_at_once = done.stdout.split()
    assert status == "done"
    reshard(handler.folder / "model", tmp_path / "local", tp=4)
    for path in (tmp_path / "local").glob("model*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    verify(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "ep2tp.json").read_text())
    assert manifest["source"] == {"repo": "lab/model", "revision": COMMIT}
    assert not any("pytorch_model.bin" in request or "consolidated" in request for request in handler.requests)
    if way == "stream":
        assert int(most_at_once) == 1
        assert sum("/revision/v1" in request for request in handler.requests) == 1
        assert not list((tmp_path / "home").rglob("*.safetensors"))
    other_way = convert(hub, tmp_path, "cache" if way == "stream" else "stream", "lab/model")
    assert other_way.stdout.startswith("complete"), other_way.stderr[-3000:]


def test_killed_while_streaming(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(3):
        assert convert(hub, tmp_path, "stream", "lab/model", layout="ranks", ranks=[1], kill=True).returncode == -9
        (left,) = [path for path in (out / ".ep2tp").glob("fetch-*/**/blobs/*") if len(path.name) == 64]
        left.rename(left.with_name("0" * 64))  # as if it were another file than the one that comes next
    done = convert(hub, tmp_path, "stream", "lab/model", layout="ranks")
    assert done.stdout.split() == ["done", "1"], done.stderr[-3000:]
    verify(out, hub[1].folder / "model")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_verify_while_another_verifies_and_after_one_was_killed(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    """Each has its own file of the moment, beside the checkpoint, in which not even a time stamp changes."""
    model, out = hub[1].folder / "model", tmp_path / "out"
    reshard(model, out, tp=4)
    tensors = str(verify(out, model).tensors)
    files, before = {path.name for path in tmp_path.iterdir()} | {"home"}, out.stat().st_mtime_ns
    killed = start_verify(hub, tmp_path, "kill")
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    left = {path for path in tmp_path.iterdir() if path.name not in files}
    assert [path.name.startswith("out.verify-") for path in left] == [True]
    waiting = start_verify(hub, tmp_path, "wait")
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "comparing\n"
    for process in (start_verify(hub, tmp_path), waiting):
        said, errors = process.communicate("go on\n", timeout=120)
        assert process.returncode == 0, errors[-3000:]
        count, place = said.split()
        assert (count, Path(place).parent) == (tensors, tmp_path)
    assert {path for path in tmp_path.iterdir() if path.name not in files} == left
    assert out.stat().st_mtime_ns == before


@pytest.mark.parametrize("way", ["stream", "cache"])
def test_damaged_download(hub: tuple[str, type[Hub]], tmp_path: Path, way: str) -> None:
    done = convert(hub, tmp_path, way, "lab/damaged")
    assert done.returncode == 1 and "download is damaged" in done.stderr and not (tmp_path / "out/config.json").exists()


def test_deepseek_parts(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    shutil.copy(hub[1].folder / "config.json", tmp_path)
    done = convert(hub, tmp_path, "cache", "lab/parts")
    assert done.stdout.split() == ["done", "0"], done.stderr[-3000:]
    verify(tmp_path / "out", hub[1].folder / "parts", config=tmp_path / "config.json")
    assert json.loads((tmp_path / "out" / "ep2tp.json").read_text())["source"]["repo"] == "lab/parts"
    streamed = convert(hub, tmp_path, "stream", "lab/parts")
    assert streamed.returncode == 1 and "leave --stream out" in streamed.stderr


@pytest.mark.parametrize("way", ["stream", "cache"])
def test_the_config_of_a_hub_model(hub: tuple[str, type[Hub]], tmp_path: Path, way: str) -> None:
    served = hub[1].folder
    shutil.copy(served / "model" / "config.json", tmp_path)
    done = convert(hub, tmp_path, way, "lab/model")
    assert done.returncode == 1 and "has its own; leave --config out" in done.stderr
    shutil.copytree(served / "model", served / f"bare_{way}", ignore=shutil.ignore_patterns("config.json"))
    done = convert(hub, tmp_path, way, f"lab/bare_{way}")
    assert done.returncode == 0, done.stderr[-3000:]
    verify(tmp_path / "out", served / "model")


@pytest.mark.parametrize("way", ["stream", "cache"])
def test_no_hub(hub: tuple[str, type[Hub]], tmp_path: Path, way: str) -> None:
    nobody = ("http://127.0.0.1:9", hub[1])  # the discard port
    done = convert(nobody, tmp_path, way, "lab/model")
    assert done.returncode == 1 and "CheckpointError: lab/model: no such folder, and the hub says" in done.stderr
