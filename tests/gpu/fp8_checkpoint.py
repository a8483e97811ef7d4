"""Small checkpoints whose sizes do not divide into FP8 blocks over two ranks: DeepSeek-V3 or Qwen3-MoE, random weights.

Every linear is stored as DeepSeek publishes its own: FP8 E4M3 with one F32 scale for each 128x128 block, attention
included; router, norms, embeddings and head stay BF16. Command line: ``fp8_checkpoint.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ep2tp.demo.tiny import TinyModel

BLOCK = 128
_FP8_MAX = 448.0
_QUANTIZATION = {
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
}
Named = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class BlockModel(TinyModel):
    """A checkpoint of 1408-wide experts and a 2944-wide dense layer: 11 and 23 blocks, odd numbers of them.

    Attributes:
        q_lora_rank: as DeepSeek-V3, queries go through a narrow matrix.
        fp8: FP8 in blocks, or BF16 throughout.
        stored_for: write the MLPs with zeros appended, for so many ranks. That is the checkpoint which an engine
            without ep2tp can slice; it is made here without any code of ep2tp's layout.
    """

    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 4
    experts: int = 16
    top_k: int = 4
    expert_size: int = 1408
    dense_size: int = 2944
    vocabulary: int = 4096
    q_lora_rank: int = 256
    fp8: bool = True
    stored_for: int = 1

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        config = super().config()
        config["moe_intermediate_size"] = self.stored_size(self.expert_size)
        config["intermediate_size"] = self.stored_size(self.dense_size)
        if self.uses_mla:
            config["q_lora_rank"] = self.q_lora_rank
            config["rope_scaling"] = config["rope_scaling"] | {"rope_type": "yarn"}  # both names, old and new
        return config | ({"quantization_config": _QUANTIZATION} if self.fp8 else {})

    def stored_size(self, size: int) -> int:
        """An intermediate size as it is stored."""
        step = BLOCK * self.stored_for
        return size if self.stored_for == 1 else -(-size // step) * step

    def write(self, folder: Path, dtype: str = "bfloat16") -> Path:
        """Write config.json and model.safetensors; the same seed gives the same bytes. Returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self._stored(torch.Generator().manual_seed(self.seed), getattr(torch, dtype)))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1))
        return folder

    def _stored(self, generator: torch.Generator, dtype: torch.dtype) -> Named:
        for name, tensor in self._tensors(generator):
            if name.endswith("e_score_correction_bias"):
                yield name, tensor
            elif self.fp8 and "_proj" in name and tensor.ndim == 2:
                weight, scale = quantize_blocks(tensor)
                yield name, self._appended(name, weight, 1, 0.0)
                yield f"{name}_scale_inv", self._appended(name, scale, BLOCK, 1.0)
            else:
                yield name, self._appended(name, tensor.to(dtype), 1, 0.0)

    def _appended(self, name: str, tensor: torch.Tensor, per: int, value: float) -> torch.Tensor:
        """The tensor with its intermediate axis grown; ``per`` intermediate values share one element of it."""
        if ".mlp." not in name or "_proj" not in name:
            return tensor.contiguous()
        axis = 1 if "down_proj" in name else 0
        shape = list(tensor.shape)
        shape[axis] = self.stored_size(shape[axis] * per) // per
        grown = torch.full(shape, value, dtype=torch.float32).to(tensor.dtype)
        grown.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
        return grown

    def _attention(self) -> Iterator[tuple[str, int, int]]:
        for name, rows, cols in super()._attention():
            if name == "q_proj.weight" and self.uses_mla:
                yield "q_a_proj.weight", self.q_lora_rank, self.hidden
                yield "q_a_layernorm.weight", self.q_lora_rank, 0
                yield "q_b_proj.weight", rows, self.q_lora_rank
            else:
                yield name, rows, cols


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 weight and F32 ``weight_scale_inv`` (weight = FP8 x scale), one scale for each 128x128 block.

    Blocks at the lower and right edge may be partly filled, as in the 576 rows of DeepSeek's ``kv_a_proj_with_mqa``.
    """
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-12) / _FP8_MAX
    stored = (blocks / scale[:, None, :, None]).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return stored.flatten(2, 3).flatten(0, 1)[:rows, :cols].contiguous(), scale


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The F32 values of :func:`quantize_blocks`'s result."""
    rows, cols = weight.shape
    return weight.float() * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]


@dataclass(frozen=True)
class Twin(BlockModel):
    """The FP8 checkpoint's values, rounded to its blocks, in BF16."""

    fp8: bool = False

    def _stored(self, generator: torch.Generator, dtype: torch.dtype) -> Named:
        for name, tensor in self._tensors(generator):
            if "_proj" in name and tensor.ndim == 2:
                yield name, dequantize_blocks(*quantize_blocks(tensor)).to(dtype)
            else:
                yield name, tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)


if __name__ == "__main__":
    print(BlockModel().write(Path(sys.argv[1])))
