"""Measures ``ep2tp reshard``: throughput against cp, and peak memory against size.

    python tests/benchmarks/reshard.py FOLDER [--gigabytes 4.2] [--repeat 3] [--memory 1 2 4 8]

FOLDER needs room for about four times the largest checkpoint. Every figure comes from one run on one machine; the
commands take turns, each in a process of its own, and the median of the repetitions counts. Cold means that the
source's pages were given back to the kernel first (``posix_fadvise``), warm that they had just been read. ``cp`` is
timed to the end of ``fsync``, as ep2tp syncs what it writes. Core-seconds are user and system time of the process, peak
memory is what the kernel reports of it (VmHWM). The hashing floor is the time that SHA-256 of input and output takes
all cores of this machine, at a rate measured in the same run: no conversion can be faster that hashes both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from page_cache import evict

from ep2tp.checkpoint.header import build_header

HIDDEN, SIZE, EXPERTS = 2048, 1408, 64  # DeepSeek-V2-Lite's, in FP8 blocks: 1408 does not divide at TP=2
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": HIDDEN,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": SIZE,
    "intermediate_size": 10944,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
PEAK = "; import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
CONVERT = "import sys; from ep2tp.checkpoint.reshard import reshard; reshard(sys.argv[1], sys.argv[2], tp=2)"
RANKS = CONVERT.replace("tp=2", "tp=2, layout='ranks'")


@dataclass(frozen=True)
class Run:
    """Wall-clock seconds, core-seconds, and peak resident memory in bytes of one process."""

    seconds: float
    cores: float
    memory: int


def write_layer(folder: Path, layer: int, blocks: np.ndarray) -> None:
    """One file with one layer's experts, about 0.55 GB."""
    tensors = []
    for expert in range(EXPERTS):
        for name, rows, cols in (("gate", SIZE, HIDDEN), ("up", SIZE, HIDDEN), ("down", HIDDEN, SIZE)):
            module = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
            scales = -(-rows // 128), -(-cols // 128)
            tensors.append((module + ".weight_scale_inv", "F32", scales, scales[0] * scales[1] * 4))
            tensors.append((module + ".weight", "F8_E4M3", (rows, cols), rows * cols))
    tensors.sort(key=lambda tensor: tensor[1], reverse=True)  # as safetensors: by alignment
    with (folder / f"layer-{layer:02}.safetensors").open("wb") as file:
        file.write(build_header({"format": "pt"}, tensors))
        for index, (_, _, _, size) in enumerate(tensors):
            start = index * 4099 % (len(blocks) - size)
            file.write(blocks[start : start + size])
        file.flush()
        os.fsync(file.fileno())


def checkpoint(folder: Path, gigabytes: float, layers: list[Path]) -> Path:
    """A checkpoint of about that size: links to as many layers as it takes."""
    target = folder / f"source-{gigabytes:g}"
    target.mkdir()
    taken: list[Path] = []
    for path in layers:
        if sum(p.stat().st_size for p in taken) >= gigabytes * 1e9:
            break
        (target / path.name).hardlink_to(path)
        taken.append(path)
    (target / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": len(taken)}))
    return target


def weights(folder: Path) -> Iterator[Path]:
    yield from folder.rglob("*.safetensors")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in weights(folder))


def warm(folder: Path, is_warm: bool) -> None:
    if not is_warm:
        evict(folder)
        return
    for path in weights(folder):
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            while file.read(1 << 24):
                pass


def timed(command: list[str], sync: Path | None = None) -> Run:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    if sync is not None:
        for path in weights(sync):
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cores, int(output or 0) * 1024)


def hash_rate() -> float:
    """Bytes a second that SHA-256 takes on all cores together."""
    block, cores, blocks = os.urandom(8 << 20), os.cpu_count() or 1, 40

    def hash_some(_: int) -> None:
        for _ in range(blocks):
            hashlib.sha256(block)

    started = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(hash_some, range(cores)))
    return cores * blocks * len(block) / (time.perf_counter() - started)


def throughput(folder: Path, source: Path, repeat: int) -> None:
    size, rate = size_of(source), hash_rate()
    print(f"\n{size / 1e9:.2f} GB in {len(list(weights(source)))} files, {os.cpu_count()} cores, ", end="")
    print(f"SHA-256 at {rate / 1e9:.2f} GB/s on all of them, median of {repeat} (all in brackets)")
    print("| cache | what | GB written | s | GB/s written | of cp | core-seconds | hashing floor s | peak RSS MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for is_warm in (False, True):
        runs: dict[str, list[Run]] = {}
        written: dict[str, int] = {}
        for _ in range(repeat):
            for what in ("cp", "padded", "ranks"):
                out = folder / f"out-{what}"
                warm(source, is_warm)
                if what == "cp":
                    run = timed(["cp", "-r", str(source), str(out)], out)
                else:
                    code = {"padded": CONVERT, "ranks": RANKS}[what] + PEAK
                    run = timed([sys.executable, "-c", code, str(source), str(out)])
                runs.setdefault(what, []).append(run)
                written[what] = size_of(out)
                shutil.rmtree(out)
        rates = {what: written[what] / median(run.seconds for run in found) / 1e9 for what, found in runs.items()}
        for what, found in runs.items():
            all_seconds = ", ".join(f"{run.seconds:.1f}" for run in found)
            floor = "" if what == "cp" else f"{(size + written[what]) / rate:.1f}"
            print(
                f"| {'warm' if is_warm else 'cold'} | {what} | {written[what] / 1e9:.2f} | "
                f"{median(run.seconds for run in found):.1f} ({all_seconds}) | {rates[what]:.2f} | "
                f"{rates[what] / rates['cp']:.2f} | {median(run.cores for run in found):.1f} | {floor} | "
                f"{max(run.memory for run in found) / 1e6:.0f} |",
                flush=True,
            )


def memory(folder: Path, sources: list[Path]) -> None:
    print("\n| GB | peak RSS MB | |\n|---|---|---|")
    for source in sources:
        out = folder / "out-memory"
        run = timed([sys.executable, "-c", CONVERT + PEAK, str(source), str(out)])
        shutil.rmtree(out)
        print(f"| {size_of(source) / 1e9:.2f} | {run.memory / 1e6:.0f} | {'#' * round(run.memory / 1e7)} |", flush=True)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, nargs="*", default=[1, 2, 4, 8])
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    blocks = np.random.default_rng(0).integers(0, 127, 64 << 20, np.uint8)
    largest = max([given.gigabytes, *given.memory])
    layers = given.folder / "layers"
    layers.mkdir()
    while size_of(layers) < largest * 1e9:
        write_layer(layers, len(list(layers.iterdir())), blocks)
    paths = sorted(layers.iterdir())
    if given.gigabytes:
        throughput(given.folder, checkpoint(given.folder, given.gigabytes, paths), given.repeat)
    memory(given.folder, [checkpoint(given.folder, size + 0.001, paths) for size in given.memory])
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
