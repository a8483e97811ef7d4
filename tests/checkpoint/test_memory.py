"""Memory: planning grows with the tensors but not with the ranks, converting with nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

from ep2tp.checkpoint.header import build_header
from ep2tp.checkpoint.reshard import reshard

HIDDEN = 64


def sparse_checkpoint(folder: Path, layers: int, experts: int, size: int, hidden: int = HIDDEN) -> Path:
    """A Kimi-K2 in INT4, a file a layer: true headers, and data that is a hole in the file."""
    folder.mkdir()
    weight_map = {}
    for layer in range(layers):
        tensors = []
        for expert in range(experts):
            for name, rows, cols in (("gate", size, hidden), ("up", size, hidden), ("down", hidden, size)):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
                tensors.append((f"{module}.weight_packed", "I32", (rows, cols // 8), rows * cols // 2))
                tensors.append((f"{module}.weight_scale", "BF16", (rows, cols // 32), rows * cols // 16))
        start = build_header({"format": "pt"}, tensors)
        file = folder / f"model-{layer:05}.safetensors"
        with file.open("wb") as stream:
            stream.write(start)
            stream.truncate(len(start) + sum(tensor[3] for tensor in tensors))
        weight_map |= {tensor[0]: file.name for tensor in tensors}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": size,
        "vocab_size": 320,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_planning_many_tensors_for_many_ranks(tmp_path: Path) -> None:
    source = sparse_checkpoint(tmp_path / "source", layers=4, experts=128, size=512)
    count = 4 * 128 * 6
    peaks = []
    for tp in (2, 16):
        tracemalloc.start()
        try:
            conversion = reshard(source, tmp_path / "out", tp=tp, layout="ranks", dry_run=True).conversion
            assert len(conversion.sizes()) == 4 * tp and conversion.fingerprint()
            peaks.append(tracemalloc.get_traced_memory()[1] / count)
        finally:
            tracemalloc.stop()
    assert peaks[1] < 3000, peaks  # bytes a tensor; a Kimi-K2 has 2 * 10^5
    assert peaks[1] < 1.2 * peaks[0], peaks


_CONVERT = """
import sys
from ep2tp.checkpoint.reshard import reshard

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) >> 10

reshard(sys.argv[1], sys.argv[2], tp=5, workers=2, dry_run=True)
before = peak()
reshard(sys.argv[1], sys.argv[2], tp=5, workers=2)
print(peak() - before)
"""


def test_converting_files_larger_than_the_windows(tmp_path: Path) -> None:
    source = sparse_checkpoint(tmp_path / "source", layers=2, experts=32, size=1024, hidden=2048)
    assert all(file.stat().st_size > 100 << 20 for file in source.glob("*.safetensors"))
    command = [sys.executable, "-c", _CONVERT, str(source), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 80, f"{grown} MiB more than planning takes"  # two workers: a window of 8 MiB each, and rows
