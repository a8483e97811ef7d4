"""Makes small fixtures of what engines wrote: ``python -m tests.observe.trim RECORDINGS FIXTURES``.

Logs keep every line but those of tracebacks and warnings of Python's; paths of the recording machine are replaced.
Traces keep metadata, annotations, collectives, MoE layers, and one in 50 of the other events.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

_PATHS = (
    (re.compile(r"/\S*?/site-packages/"), "site-packages/"),
    (re.compile(r"/root/\.pyenv/\S*?/lib/python[\d.]+/"), "python/"),
    (re.compile(r"(?<=')(?:/[\w.-]+)+/(?=(?:sglang-)?model\b)|(?:/[\w.-]+)+/(?=(?:sglang-)?model\b)"), "/recordings/"),
    (re.compile(r"(?:/[\w.-]+)+/(?=[\w.-]+\.traces)"), "/recordings/"),
)
_DROPPED = re.compile(
    r"\] (?:  |Traceback|\s*\^)|^(?:  |Traceback|\s*\^)|Warning: |ERROR .*\] (?:\s|$)"  # tracebacks, Python's warnings
    r"|Ignore import error when loading|CUDA coredump pipe"
)
_NCCL, _MOST_NCCL = "NCCL INFO", 400
_KEPT = re.compile(r"reduce|gather|all_?to_?all|SendRecv|Broadcast|moe|topk|execute|dispatch|combine", re.IGNORECASE)


def trim_log(text: str) -> str:
    """A log without tracebacks and machine paths; of NCCL's lines the last ones of one rank."""
    lines = [line for line in text.splitlines() if line.strip() and not _DROPPED.search(line)]
    ranks = [line.split()[0].rpartition(":")[0] for line in lines if _NCCL in line]
    of_one_rank = [i for i, line in enumerate(lines) if _NCCL in line and line.startswith(ranks[0])]
    kept = set(of_one_rank[-_MOST_NCCL:])
    lines = [line for i, line in enumerate(lines) if _NCCL not in line or i in kept]
    for pattern, replacement in _PATHS:
        lines = [pattern.sub(replacement, line) for line in lines]
    return "\n".join(lines) + "\n"


def trim_trace(trace: dict[str, Any]) -> dict[str, Any]:
    """A trace with the events that tell something, and some that do not."""
    events = trace["traceEvents"]
    kept = [e for i, e in enumerate(events) if e.get("ph") == "M" or _KEPT.search(str(e.get("name"))) or i % 50 == 0]
    return {**trace, "traceName": "trace.json", "traceEvents": kept}


def trim(source: Path, target: Path) -> None:
    """Trim every recording in a folder; of each launch's traces, the last of rank 0 that it wrote."""
    target.mkdir(parents=True, exist_ok=True)
    for log in sorted(source.glob("*.log")):
        (target / log.name).write_text(trim_log(log.read_text(errors="replace")))
    for folder in sorted(source.glob("*.traces")):
        of_rank_0 = [
            path for path in sorted(folder.rglob("*.json.gz")) if re.search(r"rank[_-]?0\b|rank0|TP-0", path.name)
        ]
        for path in of_rank_0[-1:]:
            trace = trim_trace(json.loads(gzip.decompress(path.read_bytes())))
            data = gzip.compress(json.dumps(trace).encode(), mtime=0)
            (target / f"{folder.name.removesuffix('.traces')}.trace.json.gz").write_bytes(data)


if __name__ == "__main__":
    trim(Path(sys.argv[1]), Path(sys.argv[2]))
