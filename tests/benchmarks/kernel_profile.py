"""What bounds the kernel's passes, by Nsight Compute: ``kernel_profile.py --out profile.json --points dsv3-tp8:64``.

Runs each point once with the shipped tiles, and with each of the ``--sweeps``' fastest, under ``ncu``, with cold caches
and the GPU's own clocks, and prints a line a launch: microseconds, the percentage of cycles in which a scheduler issues
an instruction, warps at work on a multiprocessor, and what the others wait for.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "SchedulerStats")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "issue_share": "smsp__issue_active.avg.pct",
    "warps": "sm__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_dynamic",
    "waves": "launch__waves_per_multiprocessor",
}
SCALES = {"": 1, "%": 1, "inst": 1, "warp": 1, "register": 1, "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6}
SCALES |= {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}


def run(points: list[tuple[str, int]], sweeps: list[Path], order: Path) -> None:
    """In the profiled process: every config once to compile, and once to be profiled.

    ``order`` gets what each launch is of.
    """
    import torch

    from ep2tp.kernels.configs import to_json
    from ep2tp.kernels.fused_moe import fused_moe
    from tests.benchmarks.kernel_timing import SHAPES, make_batches, make_layer

    of_launches: list[dict[str, Any]] = []
    for name, tokens in points:
        shape = SHAPES[name]
        gate_up, down = make_layer(shape)
        [batch, *_] = make_batches(shape, tokens)
        for config in configs(name, tokens, sweeps):
            operands = (batch.x, gate_up, down, batch.topk_weights, batch.topk_ids)
            fused_moe(*operands, config=config)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            fused_moe(*operands, config=config)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            launched = 2 if config.by_token else 3  # by expert, a third one sums
            of_launches += [{"shape": name, "tokens": tokens, "config": to_json(config)}] * launched
        del gate_up, down
        torch.cuda.empty_cache()
    order.write_text(json.dumps(of_launches), encoding="utf-8")


def configs(name: str, tokens: int, sweeps: list[Path]) -> Iterator[Any]:
    """The shipped config of a point, if there is one, and each sweep's fastest with inputs of 16 and of 8 bits."""
    import torch
    from kernel_sweep import fastest_of_each

    from ep2tp.kernels.configs import choose
    from tests.benchmarks.kernel_timing import SHAPES

    shipped = choose(torch.cuda.get_device_name(), SHAPES[name].key, SHAPES[name].format, tokens)
    found = [shipped] if shipped else []
    for path in sweeps:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        found += [config for _, config in fastest_of_each(results, name, tokens)]
    yield from dict.fromkeys(found)


def launches(text: str) -> Iterator[dict[str, Any]]:
    """The launches in what ``ncu --csv --page raw`` printed: a line of names, one of units, then one a launch."""
    start = text.index('"ID"')
    names, units, *rows = csv.reader(io.StringIO(text[start:]))
    for row in rows:
        if len(row) != len(names):
            continue
        found = dict(zip(names, row, strict=True))
        scale = dict(zip(names, units, strict=True))
        line: dict[str, Any] = {"kernel": found["Kernel Name"], "grid": found["Grid Size"]}
        for key, metric in METRICS.items():
            name = next((name for name in names if name.startswith(metric)), None)
            line[key] = _number(found[name], scale[name]) if name else None
        stalls = {match[1]: _number(found[name], "") for name in names if (match := STALL.match(name))}
        line["waits"] = dict(sorted(stalls.items(), key=lambda item: -item[1]))
        yield line


def _number(text: str, unit: str) -> float:
    """In microseconds or bytes, where the unit is of time or size."""
    amount, _, _ = unit.partition("/")
    if amount not in SCALES:
        raise SystemExit(f"ncu has a unit {unit!r}, which this script does not know")
    return float(text.replace(",", "")) * SCALES[amount]


def main() -> None:
    """Profile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    parser.add_argument("--points", required=True, help="shape:tokens, comma-separated")
    parser.add_argument("--sweeps", type=Path, nargs="*", default=[], help="of kernel_sweep.py")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    points = [(name, int(tokens)) for name, _, tokens in (point.partition(":") for point in options.points.split(","))]
    if options.run:
        run(points, options.sweeps, options.out.with_suffix(".order"))
        return
    sections = [word for section in SECTIONS for word in ("--section", section)]
    own = [sys.executable, *sys.argv, "--run"]
    profiler = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none", *sections]
    done = subprocess.run([*profiler, *own], stdout=subprocess.PIPE, text=True)
    if done.returncode or '"ID"' not in done.stdout:
        raise SystemExit(f"ncu ended with {done.returncode}:\n{done.stdout[-3000:]}")
    order = options.out.with_suffix(".order")
    of_launches = json.loads(order.read_text(encoding="utf-8"))
    order.unlink()
    found = [{**of, **launch} for of, launch in zip(of_launches, launches(done.stdout), strict=True)]
    options.out.write_text(json.dumps({"command": sys.argv, "launches": found}, indent=1) + "\n", encoding="utf-8")
    for line in found:
        waits = ", ".join(f"{name} {value:.1f}" for name, value in list(line.pop("waits").items())[:4])
        print(" | ".join(f"{key} {value}" for key, value in line.items() if key != "config"), "|", waits)


if __name__ == "__main__":
    main()
