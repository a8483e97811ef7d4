"""How long vLLM takes to load published expert shapes over two ranks, and what each rank reads from disk.

    PYTHONPATH=. python3 tests/benchmarks/load_time.py OUT [--folder DIR] [--moe-layers N] [--repeats N]

Checkpoints with experts of Qwen3-235B's and GLM-4.5-Air's shape, in FP8 blocks of 128x128 with random values, are
written and resharded; then each way of loading them is started in turn, with the page cache emptied of the checkpoint.
OUT gets a line of JSON for each start. Seconds are what vLLM logs for reading the weights, bytes the kernel's count for
each rank's process. With one GPU both ranks share it (``tests/gpu/shared_gpu.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from ep2tp.checkpoint.reshard import reshard
from ep2tp.demo.launch import run_logged

GPU_TESTS = Path(__file__).parent.parent / "gpu"
sys.path.insert(0, str(GPU_TESTS))

from fp8_checkpoint import BLOCK, BlockModel
from page_cache import evict

TP = 2
ONE_START_S = 150.0


@dataclass(frozen=True)
class LargeModel(BlockModel):
    """A checkpoint too large to be drawn from a normal distribution: random bits for FP8, a file for each layer."""

    def write(self, folder: Path, dtype: str = "bfloat16") -> Path:
        """Write config.json, the index and a file for each layer. Returns the folder."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1))
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self._drawn():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            parts.setdefault(f"layer-{layer[1]}" if layer else "model", {})[name] = tensor
        index = {}
        for part, tensors in parts.items():
            save_file(tensors, folder / f"{part}.safetensors", metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, f"{part}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return folder

    def _drawn(self) -> Iterator[tuple[str, torch.Tensor]]:
        torch.manual_seed(self.seed)
        with FakeTensorMode():  # names and shapes alone
            shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors(torch.Generator())}
        for name, shape in shapes.items():
            if "_proj" in name and len(shape) == 2:
                yield name, _fp8(*shape)
                rows, cols = (-(-size // BLOCK) for size in shape)
                yield f"{name}_scale_inv", torch.full((rows, cols), 2.0 / shape[1] ** 0.5)
            elif "norm" in name:
                yield name, torch.ones(shape, dtype=torch.bfloat16)
            else:
                dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
                yield name, torch.randn(shape, dtype=dtype) * 0.02


def _fp8(rows: int, cols: int) -> torch.Tensor:
    """Random E4M3 values between -2 and 2."""
    bits = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    return (bits & 0xBF).view(torch.float8_e4m3fn).cpu()


_SHAPES: dict[str, Any] = {"hidden": 4096, "heads": 64, "kv_heads": 4, "experts": 128, "top_k": 8}
MODELS = {
    "qwen3-235b": LargeModel("qwen3_moe", expert_size=1536, **_SHAPES),
    "glm-4.5-air": LargeModel("glm4_moe", expert_size=1408, dense_size=10944, **_SHAPES),
}


@dataclass(frozen=True)
class Way:
    """A way of loading a model.

    Attributes:
        layout: of ``ep2tp reshard``; None is the checkpoint as published.
        ep2tp: the value of ``EP2TP``; None is a vLLM that loads no plugin.
        ep: whether the launch asks for expert parallelism.
    """

    model: str
    layout: str | None
    ep2tp: str | None
    ep: bool = False

    @property
    def name(self) -> str:
        """For a table."""
        files = {None: "checkpoint", "padded": "padded by ep2tp reshard", "ranks": "rank files of ep2tp reshard"}
        engine = "stock TP" if self.ep2tp is None else "EP recipe rewritten" if self.ep else "--load-format ep2tp"
        return f"{files[self.layout]}, {engine}"


WAYS = [
    Way("qwen3-235b", None, None),
    Way("qwen3-235b", None, "on", ep=True),
    Way("qwen3-235b", "ranks", "on"),
    Way("glm-4.5-air", None, "on", ep=True),
    Way("glm-4.5-air", "padded", None),
    Way("glm-4.5-air", "ranks", "on"),
]


def measure(way: Way, folder: Path, logs: Path) -> dict[str, Any]:
    """Start vLLM once on cold files, generate, and say what loading took."""
    evict(folder)
    logs.mkdir(parents=True, exist_ok=True)
    result = logs / f"{way.model}-{way.layout}-{way.ep}-{time.monotonic_ns()}"
    engine = {"moe_backend": "triton", "load_format": "ep2tp"} if way.layout == "ranks" else {"moe_backend": "triton"}
    command = [sys.executable, str(GPU_TESTS / "generate.py"), str(folder), str(result), "--tp", str(TP)]
    command += ["--engine", json.dumps(engine), *(["--ep"] if way.ep else [])]
    command += ["--shared-gpu"] if torch.cuda.device_count() < TP else []
    plugin = {"VLLM_PLUGINS": ""} if way.ep2tp is None else {"EP2TP": way.ep2tp}
    paths = os.pathsep.join([str(GPU_TESTS), os.environ.get("PYTHONPATH", "")])
    spawned = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    log = result.with_suffix(".log")
    status = run_logged(command, os.environ | spawned | plugin | {"PYTHONPATH": paths}, log, ONE_START_S)
    text = log.read_text(errors="replace")
    if status:
        return {"error": text[-600:]}
    facts = json.loads(result.with_suffix(".json").read_text())
    return {
        "weights_s": [float(s) for s in re.findall(r"Loading weights took ([\d.]+) seconds", text)],
        "model_s": [float(s) for s in re.findall(r"Model loading took .*? and ([\d.]+) seconds", text)],
        "start_s": facts["start_seconds"],
        "read_bytes": [rank["read_bytes"] for rank in facts["ranks"]],
        "tokens": facts["tokens"],
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import vllm

    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()
    disk = subprocess.run(["df", "-T", tempfile.gettempdir()], capture_output=True, text=True).stdout.splitlines()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpus": gpus,
        "cores": os.cpu_count(),
        "disk": disk[-1],
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
    }


def main() -> None:
    """Write the checkpoints, reshard them, and start each way in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, help="for checkpoints of 12 and 9 GB, each written two or three times")
    parser.add_argument("--moe-layers", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))
    lines = options.out.open("a")

    def note(**facts: Any) -> None:
        print(json.dumps(facts)[:400], flush=True)
        lines.write(json.dumps(facts) + "\n")
        lines.flush()

    try:
        note(**machine())
        for name, model in MODELS.items():
            grown = dataclasses.replace(model, layers=options.moe_layers + model.dense_layers)
            source = grown.write(root / f"{name}-None")
            note(model=name, bytes=sum(path.stat().st_size for path in source.glob("*.safetensors")))
            for layout in {way.layout for way in WAYS if way.model == name and way.layout}:
                begin = time.monotonic()
                reshard(source, root / f"{name}-{layout}", tp=TP, layout=layout)
                note(model=name, reshard=layout, seconds=round(time.monotonic() - begin, 1))
            ways = [way for way in WAYS if way.model == name]
            for _ in range(options.repeats):
                for way in ways:
                    found = measure(way, root / f"{name}-{way.layout}", options.out.parent / "load-logs")
                    note(model=name, way=way.name, **found)
            for path in root.iterdir():
                shutil.rmtree(path)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
