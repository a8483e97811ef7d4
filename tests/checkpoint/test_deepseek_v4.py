"""DeepSeek-V4: names of its own, routed experts in MXFP4 beside shared ones in FP8 blocks with E8M0 scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from tests.checkpoint.checkpoints import Stored, load, same_bits, values, write_files

HIDDEN, SIZE, PADDED, EXPERTS, TP = 256, 192, 512, 2, 4
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": SIZE,
    "vocab_size": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
}


def tensors() -> Stored:
    rng, found = np.random.default_rng(0), {}
    for layer in range(2):
        for name, rows, cols in (("w1", SIZE, HIDDEN), ("w3", SIZE, HIDDEN), ("w2", HIDDEN, SIZE)):
            for expert in range(EXPERTS):
                routed = f"layers.{layer}.ffn.experts.{expert}.{name}"
                found[routed + ".weight"] = values(rng, "I8", rows, cols // 2)
                found[routed + ".scale"] = values(rng, "F8_E8M0", rows, cols // 32)
            shared = f"layers.{layer}.ffn.shared_experts.{name}"
            found[shared + ".weight"] = values(rng, "F8_E4M3", rows, cols)
            found[shared + ".scale"] = values(rng, "F8_E8M0", -(-rows // 128), -(-cols // 128))
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def test_deepseek_v4(tmp_path: Path) -> None:
    old = tensors()
    source = tmp_path / "source"
    source.mkdir()
    write_files(source, old, 2)
    (source / "config.json").write_text(json.dumps(CONFIG))
    reshard(source, tmp_path / "padded", tp=TP)
    reshard(source, tmp_path / "ranks", tp=TP, layout="ranks")
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["moe_intermediate_size"] == PADDED
    new, shared = load(tmp_path / "padded"), load(tmp_path / "ranks" / "shared")
    slices = [load(tmp_path / "ranks" / f"rank-{rank}-of-{TP}") for rank in range(TP)]
    for name, before in old.items():
        after, axis = new[name], 1 if ".w2." in name else 0
        real = before.shape[axis]
        assert torch.equal(bits(after).narrow(axis, 0, real), bits(before)), name
        padding = bits(after).narrow(axis, real, after.shape[axis] - real)
        assert padding.numel() and (padding == (127 if name.endswith("scale") else 0)).all(), name  # 127: 2 ** 0
        if ".shared_experts." in name:
            assert same_bits(shared[name], after)
        else:
            assert torch.equal(torch.cat([bits(tensors[name]) for tensors in slices], axis), bits(after)), name
    for layout in ("padded", "ranks"):
        assert verify(tmp_path / layout, source).tensors == len(old)
