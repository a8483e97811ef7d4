"""Measures what planning a conversion takes for the largest models: seconds, and peak memory as the kernel reports it.

    python tests/benchmarks/reshard_planning.py FOLDER

FOLDER gets the headers of Kimi-K2 (INT4, groups of 32) and DeepSeek-V3 (FP8 blocks) with all their experts; the data
are holes, which take no disk. Each plan is made in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.header import build_header

HIDDEN, SIZE = 7168, 2048
COMMON = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": SIZE,
    "intermediate_size": 18432,
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
MODELS: dict[str, dict[str, Any]] = {
    "Kimi-K2 INT4": {
        "model_type": "kimi_k2",
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
        },
    },
    "DeepSeek-V3 FP8": {
        "model_type": "deepseek_v3",
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
}
PLAN = """
import re, sys, time
from pathlib import Path
from ep2tp.checkpoint.prepare import open_source, prepare
started = time.perf_counter()
conversion = prepare(open_source(sys.argv[1], Path("unused")), int(sys.argv[3]), sys.argv[2])
conversion.fingerprint()
seconds = time.perf_counter() - started
tensors = sum(len(job.items) for job in conversion.jobs)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(f"| {tensors:,} | {sys.argv[2]}, TP={sys.argv[3]} | {seconds:.1f} | {peak:.0f} |")
"""


def tensors_of(module: str, rows: int, cols: int, is_packed: bool) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, bytes) of one projection."""
    if is_packed:
        yield f"{module}.weight_packed", "I32", (rows, cols // 8), rows * cols // 2
        yield f"{module}.weight_scale", "BF16", (rows, cols // 32), rows * cols // 16
        yield f"{module}.weight_shape", "I32", (2,), 8
    else:
        scales = rows // 128, cols // 128
        yield f"{module}.weight_scale_inv", "F32", scales, scales[0] * scales[1] * 4
        yield f"{module}.weight", "F8_E4M3", (rows, cols), rows * cols


def write(folder: Path, model: dict[str, Any]) -> None:
    """One file for each MoE layer, with holes for data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(COMMON | model))
    for layer in range(model["first_k_dense_replace"], 61):
        tensors = [
            tensor
            for expert in range(model["n_routed_experts"])
            for name, rows, cols in (("gate", SIZE, HIDDEN), ("up", SIZE, HIDDEN), ("down", HIDDEN, SIZE))
            for tensor in tensors_of(
                f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj", rows, cols, model["model_type"] == "kimi_k2"
            )
        ]
        header = build_header({"format": "pt"}, tensors)
        with (folder / f"layer-{layer:02}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(size for *_, size in tensors))


def main(folder: Path) -> None:
    """Plan every model in every way."""
    print("| model | tensors | layout | s | peak RSS MiB |\n|---|---|---|---|---|")
    for name, model in MODELS.items():
        write(folder / "model", model)
        for layout, ranks in (("padded", "8"), ("ranks", "8"), ("ranks", "16")):
            command = [sys.executable, "-c", PLAN, str(folder / "model"), layout, ranks]
            print(f"| {name} {subprocess.run(command, check=True, capture_output=True, text=True).stdout}", end="")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
