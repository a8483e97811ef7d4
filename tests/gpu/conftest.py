"""Where the GPU tests write: a folder for logs, and figures as lines of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ["GPU_TEST_LOGS"]) if "GPU_TEST_LOGS" in os.environ else tmp_path_factory.mktemp("logs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def note(out: Path, request: pytest.FixtureRequest) -> Any:
    """Print a figure and append it to figures.jsonl."""

    def write(**figures: Any) -> None:
        line = json.dumps({"test": request.node.name, **figures}, default=str)
        print(line)
        with (out / "figures.jsonl").open("a") as stream:
            stream.write(line + "\n")

    return write
