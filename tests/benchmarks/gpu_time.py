"""What a GPU did, from a torch profiler's trace: ``gpu_time.py TRACE.json[.gz] [STEPS]`` prints it a step."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SHOWN = 15


def gpu_time(trace: Path, steps: int) -> dict[str, Any]:
    """Milliseconds a step in which any kernel ran, and of each kernel by name, the longest first.

    Kernels that overlap count once in ``busy_ms``, and each for itself in ``kernels_ms``.
    """
    content = trace.read_bytes()
    events = json.loads(gzip.decompress(content) if trace.suffix == ".gz" else content)["traceEvents"]
    kernels = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "kernel")
    by_name: Counter[str] = Counter()
    busy, end = 0.0, float("-inf")
    for start, stop, name in kernels:
        by_name[name] += stop - start
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    longest = {name: round(us / steps / 1e3, 4) for name, us in by_name.most_common(SHOWN)}
    return {"busy_ms": round(busy / steps / 1e3, 4), "kernels_ms": longest}


if __name__ == "__main__":
    print(json.dumps(gpu_time(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1), indent=1))
