"""``ep2tp plan --calibrate``: measures this machine's collectives and memory bandwidth. Imports torch when it runs.

One process a rank, NCCL on GPUs (one GPU each), gloo without. On GPUs each collective is captured in a CUDA graph, as
engines run them in decode, so that the processor's launches are not measured; where a graph cannot be captured,
launches are timed one by one, and the profile says so.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ep2tp.errors import Ep2tpError
from ep2tp.planner.profile import Profile, read_profile, write_profile

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = tuple(1 << n for n in range(13, 27))  # bytes of payload: 8 KiB to 64 MiB
_CPU_SIZES = SIZES[:10]  # to 4 MiB: gloo is for checking, not for serving
_REPEATS, _IN_GRAPH = 7, 10
_LIMIT_S = 240


def calibrate(ranks: int | None, path: Path, limit_s: float = _LIMIT_S) -> Profile:
    """Measure and store a profile.

    Args:
        ranks: processes; all GPUs of this machine where None, or 2 without GPUs.
        path: where to store it.
        limit_s: seconds after which the measurement is given up.

    Raises:
        Ep2tpError: torch is missing, there are fewer GPUs, or a rank fails or hangs.
    """
    gpus = _visible_gpus()
    ranks = ranks or gpus or 2
    if ranks < 2:
        raise Ep2tpError("--calibrate measures collectives between GPUs; this machine shows one. Use --link NAME")
    if gpus and ranks > gpus:
        raise Ep2tpError(f"--calibrate --gpus {ranks}: this machine shows {gpus} GPUs")
    backend = "nccl" if gpus else "gloo"
    write_profile(path, _run(ranks, backend, limit_s))
    return read_profile(path)


def _visible_gpus() -> int:
    try:
        import torch
    except ImportError:
        raise Ep2tpError("--calibrate needs torch, which every engine brings; install one beside ep2tp") from None
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _run(ranks: int, backend: str, limit_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ep2tp-calibrate-") as folder, ExitStack() as stack:
        result = Path(folder) / "profile.json"
        logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            process = subprocess.Popen(
                [sys.executable, "-m", "ep2tp.planner.calibrate", backend, str(result), str(rank), str(ranks)],
                stdout=stack.enter_context(log.open("wb")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        _wait(processes, logs, backend, limit_s)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _wait(processes: list[subprocess.Popen[bytes]], logs: list[Path], backend: str, limit_s: float) -> None:
    """Wait for all ranks; the first that fails ends the wait, since the others hang without it."""
    deadline = time.monotonic() + limit_s
    while None in (states := [process.poll() for process in processes]) and not any(states):
        if time.monotonic() > deadline:
            raise Ep2tpError(
                f"--calibrate: {backend} did not finish in {limit_s:.0f} s. Where peer to peer hangs, set "
                "NCCL_P2P_DISABLE=1 and measure again"
            )
        time.sleep(0.1)
    for rank, (status, log) in enumerate(zip(states, logs, strict=True)):
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise Ep2tpError(f"--calibrate: rank {rank} failed: {lines[-1] if lines else f'exit status {status}'}")


def measure(backend: str, meeting: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Measure as one rank of a process group. Every rank must call it.

    Args:
        backend: ``nccl`` or ``gloo``.
        meeting: a file that does not exist, through which the ranks find each other: no port is taken meanwhile.
        rank: this process'.
        ranks: how many there are.

    Returns:
        The profile: ``collectives`` (op, bytes of the whole payload, median us), ``memory_bandwidth`` in bytes a
        second, and what was measured how.
    """
    import torch
    import torch.distributed as dist

    on_gpu = backend == "nccl"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    place = {"init_method": meeting.as_uri(), "rank": rank, "world_size": ranks}
    dist.init_process_group(backend, device_id=device if on_gpu else None, **place)
    rows, in_graphs = [], on_gpu
    for size in SIZES if on_gpu else _CPU_SIZES:
        for kind in KINDS:
            operation = _operation(kind, size, ranks, device)
            if operation is None:
                continue
            us, captured = _time(operation, on_gpu and in_graphs)
            in_graphs = in_graphs and captured
            rows.append({"op": kind, "bytes": size, "us": round(us, 2)})
    profile = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "backend": f"{backend}{' in CUDA graphs' if in_graphs else ', launched one by one'}",
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "ranks": ranks,
        "collectives": rows,
        "memory_bandwidth": _bandwidth(device),
    }
    dist.barrier()
    dist.destroy_process_group()
    return profile


def _operation(kind: str, size: int, ranks: int, device: Any) -> Callable[[], Any] | None:
    """A collective whose whole payload is about ``size`` bytes of BF16; None where the backend lacks it."""
    import torch
    import torch.distributed as dist

    part = max(1, size // 2 // ranks)
    whole = torch.zeros(part * ranks, dtype=torch.bfloat16, device=device)
    piece = torch.zeros(part, dtype=torch.bfloat16, device=device)
    other = torch.zeros_like(whole)
    operations: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, piece),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(piece, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
    }
    try:
        operations[kind]()
    except (RuntimeError, NotImplementedError):  # gloo lacks some
        return None
    return operations[kind]


def _time(operation: Callable[[], Any], in_graph: bool) -> tuple[float, bool]:
    """(median microseconds of one call, whether a CUDA graph was timed)."""
    import torch.distributed as dist

    times = 1
    if in_graph:
        try:
            operation, times = _captured(operation), _IN_GRAPH
        except RuntimeError:
            in_graph = False
    samples = []
    for _ in range(_REPEATS + 2):
        dist.barrier()
        _synchronize()
        start = time.perf_counter()
        for _ in range(1 if in_graph else 5):
            operation()
        _synchronize()
        samples.append((time.perf_counter() - start) / (times if in_graph else 5))
    return statistics.median(samples[2:]) * 1e6, in_graph


def _captured(operation: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        operation()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own threads may go on meanwhile
        for _ in range(_IN_GRAPH):
            operation()
    replay: Callable[[], Any] = graph.replay
    return replay


def _bandwidth(device: Any) -> float:
    """Bytes a second from and to memory, of a matrix far larger than any cache: the faster of two ways.

    A matrix-vector product only reads, as decode does; a copy, which reads and writes, is nearer to the limit on some
    GPUs (an H100: 2.6 to 2.7 TB/s by the product, 3.0 by the copy). A bound takes the best that was seen.
    """
    import torch

    rows, dtype = (1 << 15, torch.bfloat16) if device.type == "cuda" else (1 << 13, torch.float32)  # 2 GiB, 256 MiB
    matrix, vector = torch.zeros(rows, rows, dtype=dtype, device=device), torch.zeros(rows, dtype=dtype, device=device)
    size, copy = float(matrix.numel() * matrix.element_size()), torch.empty_like(matrix)
    product = _seconds(lambda: torch.mv(matrix, vector))
    return max(size / product, 2 * size / _seconds(lambda: copy.copy_(matrix)))


def _seconds(operation: Callable[[], Any]) -> float:
    """Median seconds of a call, of several that follow each other without a pause."""
    samples = []
    for _ in range(_REPEATS + 2):
        _synchronize()
        start = time.perf_counter()
        for _ in range(3):
            operation()
        _synchronize()
        samples.append((time.perf_counter() - start) / 3)
    return statistics.median(samples[2:])


def _synchronize() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _main(backend: str, result: str, rank: str, ranks: str) -> None:
    measured = measure(backend, Path(result).with_name("meeting"), int(rank), int(ranks))
    if rank == "0":
        Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
