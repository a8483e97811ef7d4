"""A decode step of vLLM with its own fused-MoE kernel and with ep2tp's, in turn, on one GPU with CUDA graphs.

    kernel_decode_step.py --out results.json                 an H100: about three minutes
    kernel_decode_step.py --out results.json --dry-run       a tiny model on this CPU: does the harness itself work?

The model is one rank's part of DeepSeek-V3 at TP8: every expert's slice (256 x 7168 x 256, FP8 blocks), 16 of 128
heads, 1/8 of the dense layer, the shared expert and the vocabulary; fewer layers; random weights; uniform routing
(VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random). Nothing is sent between GPUs, so a step's time is computation.
Both engines stand at once and are timed in turns, so that clocks and heat hit both alike; a turn times every batch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ep_vs_tp import _end_group, _machine, _numbers
from ep_vs_tp_models import MODELS

from ep2tp.demo.engines import CPU_ENVIRONMENT

HERE = Path(__file__).parent
RANKS = 8
KERNELS = ("engine", "ep2tp")


def config(layers: int) -> dict[str, Any]:
    """config.json of one rank's part of DeepSeek-V3."""
    sliced = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
    whole = MODELS["v3-fp8"]
    return {**whole, **{name: whole[name] // RANKS for name in sliced}, "num_hidden_layers": layers}


class Engine:
    """An engine in a process of its own, with one of the two kernels."""

    def __init__(self, kernel: str, folder: Path, logs: Path, options: argparse.Namespace) -> None:
        self.kernel, self.stem, self.turns = kernel, logs / kernel, 0
        request = {
            "engine": _engine(kernel, folder, options),
            "batches": options.batches,
            "repeats": 1,
            "prompt": options.prompt,
            "skipped": options.steps // 8,
            "steps": options.steps,
            "vocabulary": json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"],
        }
        Path(f"{self.stem}.request.json").write_text(json.dumps(request), encoding="utf-8")
        with Path(f"{self.stem}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "kernel_decode_engine.py"), str(self.stem)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _environment(kernel, options.dry_run),
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it printed so far."""
        return Path(f"{self.stem}.log").read_text(encoding="utf-8", errors="replace")

    def turn(self, until: float) -> dict[str, float]:
        """Milliseconds of a step by batch."""
        Path(f"{self.stem}.turn-{self.turns}.go").touch()
        self.turns += 1
        return self.wait_for(f"turn-{self.turns - 1}.json", until)

    def wait_for(self, name: str, until: float) -> Any:
        """What it writes to one of its files.

        Raises:
            SystemExit: it ended, or time is up.
        """
        path = Path(f"{self.stem}.{name}")
        while not path.is_file():
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the engine with EP2TP_KERNEL={self.kernel} gave no {name}:\n{self.log[-4000:]}")
            time.sleep(0.05)
        return json.loads(path.read_text(encoding="utf-8"))

    def end(self) -> None:
        """Let it stop by itself for some seconds, then end it with its workers."""
        Path(f"{self.stem}.stop").touch()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        _end_group(self.process)


def main() -> None:
    """Time both, print the table, write the results."""
    options = _options()
    until = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory(prefix="kernel-decode-") as scratch, ExitStack() as running:
        folder, logs = Path(scratch) / "model", options.logs or Path(scratch)
        folder.mkdir()
        logs.mkdir(parents=True, exist_ok=True)
        if options.dry_run:
            from ep2tp.demo.tiny import TinyModel

            TinyModel(expert_size=64).write(folder)
        else:
            (folder / "config.json").write_text(json.dumps(config(options.layers)), encoding="utf-8")
        engines = []
        for kernel in options.kernels:
            engines.append(Engine(kernel, folder, logs, options))
            running.callback(engines[-1].end)
        facts = {engine.kernel: engine.wait_for("ready", until) for engine in engines}
        profiles: dict[str, Any] = {}
        samples: dict[str, list[dict[str, float]]] = {kernel: [] for kernel in options.kernels}
        for number in range(options.turns):
            for engine in engines if number % 2 == 0 else reversed(engines):
                samples[engine.kernel].append(engine.turn(until))
        for engine in engines:
            Path(f"{engine.stem}.profile.go").touch()
            profiles[engine.kernel] = engine.wait_for("profile.json", until)
        whose = {e.kernel: sorted({x.strip() for x in re.findall(r"ep2tp kernel: .*", e.log)}) for e in engines}
    result = {
        "command": sys.argv,
        **_machine(),
        "engines": facts,
        "kernels": whose,
        "layers": options.layers,
        "steps": options.steps,
        "samples": samples,
        "profiles": profiles,
        "decode": {kernel: _by_batch(found) for kernel, found in samples.items()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for lines in whose.values():
        print("\n".join(lines))
    for line in _table(result["decode"], options.kernels):
        print(line)
    for kernel, by_batch in profiles.items():
        busy = ", ".join(f"{found['busy_ms']:.3f} at {batch}" for batch, found in by_batch.items())
        print(f"{kernel}: the GPU is busy for ms a step: {busy}")


def _by_batch(turns: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    columns = {batch: [turn[batch] for turn in turns] for batch in turns[0]}
    return {b: {"ms": statistics.median(s), "least": min(s), "most": max(s)} for b, s in columns.items()}


def _table(decode: dict[str, dict[str, dict[str, float]]], kernels: list[str]) -> list[str]:
    lines = [f"{'batch':>6}" + "".join(f"  {kernel + ': ms a step (least to most)':>36}" for kernel in kernels)]
    for batch in decode[kernels[0]]:
        cells = [decode[kernel][batch] for kernel in kernels]
        text = "".join(f"  {c['ms']:>16.3f} ({c['least']:.3f} to {c['most']:.3f})" for c in cells)
        lines.append(f"{batch:>6}{text}  {cells[0]['ms'] / cells[-1]['ms']:>6.3f}x")
    return lines


def _environment(kernel: str, is_dry: bool) -> dict[str, str]:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {
        "EP2TP": "auto",
        "EP2TP_KERNEL": kernel,
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not is_dry:
        return {
            **shared,
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random",
        }
    if kernel == "ep2tp":
        paths.insert(0, str(HERE.parent / "engines" / "kernel_stand_in"))
    return {**shared, **CPU_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}


def _engine(kernel: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    traces = folder.with_name(f"traces-{kernel}")
    traces.mkdir()
    shared: dict[str, Any] = {
        "profiler_config": {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_with_stack": False},
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "enable_prefix_caching": False,
        "max_model_len": options.prompt + options.steps,
        "max_num_seqs": max(options.batches),
        "max_num_batched_tokens": 2048,
    }
    if options.dry_run:
        return {**shared, "dtype": "float32", "enforce_eager": True}
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted(options.batches)}
    memory = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2 << 30}  # two engines share the GPU
    return {**shared, **memory, "moe_backend": "triton", "disable_log_stats": True, "compilation_config": graphs}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--logs", type=Path, help="folder for engine logs (default: thrown away)")
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=list(KERNELS))
    parser.add_argument("--layers", type=int, default=16, help="the first one dense; 1.4 GB of experts in each other")
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16, 64])
    parser.add_argument("--turns", type=int, default=5, help="of each engine")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a request's prompt")
    parser.add_argument("--steps", type=int, default=320, help="tokens of a generation; the first eighth is not timed")
    parser.add_argument("--budget", type=float, default=230, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    options = parser.parse_args()
    if options.dry_run:
        options.batches, options.turns, options.steps, options.layers = [1, 4], 2, 16, 3
    return options


if __name__ == "__main__":
    main()
