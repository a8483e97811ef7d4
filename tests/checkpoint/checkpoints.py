"""Small checkpoints in each quantisation format, written with the safetensors library, and what their values are.

Shapes and dequantisation are written out here again, from the formats' own documents, not taken from ep2tp.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file

HIDDEN = 256
_NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}

Stored = dict[str, torch.Tensor]


def values(rng: np.random.Generator, dtype: str, *shape: int) -> torch.Tensor:
    """Random bits of a dtype, finite."""
    kind = getattr(torch, _NAMES[dtype])
    if dtype in ("F32", "BF16", "F16"):
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(kind)
    bits = rng.integers(0, 256, (*shape, kind.itemsize), np.uint8)
    if dtype == "F8_E4M3":
        bits[(bits & 0x7F) == 0x7F] = 0x38
    if dtype == "F8_E8M0":
        bits = bits % 20 + 117
    return torch.from_numpy(bits).view(kind).reshape(shape)


@dataclass(frozen=True)
class Format:
    """How a test stores a matrix, and reads it back."""

    quantization: Mapping[str, Any] | None
    store: Callable[[np.random.Generator, int, int], Stored]
    load: Callable[[Stored], torch.Tensor]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def spread(scales: torch.Tensor, rows: int, cols: int, shape: tuple[int, ...]) -> torch.Tensor:
    return scales.double().repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: shape[0], : shape[1]]


def fp8_block(scale: str, suffix: str) -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        return {
            ".weight": values(rng, "F8_E4M3", r, c),
            suffix: values(rng, scale, cdiv(r, 128), cdiv(c, 128)),
        }

    def load(t: Stored) -> torch.Tensor:
        weight = t[".weight"].double()
        return weight * spread(t[suffix], 128, 128, tuple(weight.shape))

    return Format({"quant_method": "fp8", "weight_block_size": [128, 128]}, store, load)


def fp8_tensor() -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        weight = values(rng, "F8_E4M3", r, c)
        return {".weight": weight, ".weight_scale": torch.tensor(0.5), ".input_scale": torch.tensor(2.0)}

    return Format(
        {"quant_method": "fp8", "activation_scheme": "static"},
        store,
        lambda t: t[".weight"].double() * t[".weight_scale"].double(),
    )


def fp8_channel() -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        return {".weight": values(rng, "F8_E4M3", r, c), ".weight_scale": values(rng, "F32", r, 1)}

    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    return Format(
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}},
        store,
        lambda t: t[".weight"].double() * t[".weight_scale"].double(),
    )


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Two 4-bit values a byte, low first, along the last axis."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def words(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Values packed into I32, low first, along the last axis."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    wide = packed.to(torch.int64) & 0xFFFFFFFF
    return (wide.unsqueeze(-1) >> shifts & (1 << bits) - 1).reshape(*packed.shape[:-1], -1)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def int_packed(bits: int, group: int) -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        return {
            ".weight_packed": values(rng, "I32", r, c * bits // 32),
            ".weight_scale": values(rng, "BF16", r, c // group),
            ".weight_shape": torch.tensor([r, c]),
        }

    def load(t: Stored) -> torch.Tensor:
        weight = words(t[".weight_packed"], bits).double() - (1 << bits - 1)
        assert t[".weight_shape"].tolist() == list(weight.shape)
        return weight * spread(t[".weight_scale"], 1, group, tuple(weight.shape))

    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": True}
    return Format(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
        store,
        load,
    )


def nvfp4(packed: str, scalar: str, quantization: Mapping[str, Any]) -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        return {
            packed: values(rng, "U8", r, c // 2),
            ".weight_scale": values(rng, "F8_E4M3", r, c // 16),
            scalar: torch.tensor(0.25),
        }

    def load(t: Stored) -> torch.Tensor:
        weight = E2M1[nibbles(t[packed]).long()]
        return weight * spread(t[".weight_scale"], 1, 16, tuple(weight.shape)) * t[scalar].double()

    return Format(quantization, store, load)


def mx(packed: str, suffix: str, scale: str, quantization: Mapping[str, Any]) -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        scales = values(rng, "F8_E8M0", r, c // 32)
        scales = scales if scale == "F8_E8M0" else scales.view(torch.uint8)
        return {packed: values(rng, "U8", r, c // 2), suffix: scales}

    def load(t: Stored) -> torch.Tensor:
        weight = E2M1[nibbles(t[packed]).long()]
        return weight * spread(t[suffix].view(torch.float8_e8m0fnu), 1, 32, tuple(weight.shape))

    return Format(quantization, store, load)


def mxfp8(quantization: Mapping[str, Any]) -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        scales = values(rng, "F8_E8M0", r, c // 32).view(torch.uint8)
        return {".weight": values(rng, "F8_E4M3", r, c), ".weight_scale": scales}

    def load(t: Stored) -> torch.Tensor:
        weight = t[".weight"].double()
        return weight * spread(t[".weight_scale"].view(torch.float8_e8m0fnu), 1, 32, tuple(weight.shape))

    return Format(quantization, store, load)


_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # AutoAWQ interleaves the eight values of a word


def awq(group: int) -> Format:
    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        return {
            ".qweight": values(rng, "I32", c, r // 8),
            ".qzeros": values(rng, "I32", c // group, r // 8),
            ".scales": values(rng, "F16", c // group, r),
        }

    def load(t: Stored) -> torch.Tensor:
        def unpack(packed: torch.Tensor) -> torch.Tensor:
            return words(packed, 4).reshape(len(packed), -1, 8)[..., _AWQ_ORDER].reshape(len(packed), -1).double()

        weight, zeros = unpack(t[".qweight"]), unpack(t[".qzeros"]).repeat_interleave(group, 0)
        return ((weight - zeros) * t[".scales"].double().repeat_interleave(group, 0)).T

    return Format({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}, store, load)


def gptq(group: int, bits: int = 4, version: int = 1, is_symmetric: bool = True) -> Format:
    """Version 1 stores zero points less one."""
    per_word, middle = 32 // bits, (1 << bits - 1) - (version == 1)

    def store(rng: np.random.Generator, r: int, c: int) -> Stored:
        symmetric = torch.full((c // group, r // per_word), middle * 0x01010101 * (0x11 if bits == 4 else 1))
        return {
            ".qweight": values(rng, "I32", c // per_word, r),
            ".qzeros": symmetric.int() if is_symmetric else values(rng, "I32", c // group, r // per_word),
            ".scales": values(rng, "F16", c // group, r),
            ".g_idx": torch.arange(c, dtype=torch.int32) // group,
        }

    def load(t: Stored) -> torch.Tensor:
        weight = words(t[".qweight"].T.contiguous(), bits).T.double()
        zeros = words(t[".qzeros"], bits).double() + (version == 1)
        index = t[".g_idx"].long()
        return ((weight - zeros[index]) * t[".scales"].double()[index]).T

    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": is_symmetric}
    return Format(quantization | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), store, load)


_CT_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_CT_MXFP8 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}
FORMATS = {
    "bf16": Format(None, lambda rng, r, c: {".weight": values(rng, "BF16", r, c)}, lambda t: t[".weight"].double()),
    "fp8_block_f32": fp8_block("F32", ".weight_scale_inv"),
    "fp8_block_e8m0": fp8_block("F8_E8M0", ".weight_scale_inv"),
    "fp8_block_bf16": fp8_block("BF16", ".weight_scale"),
    "fp8_channel": fp8_channel(),
    "int4_g32": int_packed(4, 32),
    "int8_g64": int_packed(8, 64),
    "nvfp4_modelopt": nvfp4(".weight", ".weight_scale_2", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4_ct": nvfp4(
        ".weight_packed",
        ".weight_global_scale",
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CT_NVFP4}},
        },
    ),
    "mxfp4_ct": mx(
        ".weight_packed",
        ".weight_scale",
        "U8",
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": _CT_NVFP4 | {"strategy": "group", "group_size": 32}}
            },
        },
    ),
    "awq": awq(32),
    "gptq": gptq(32),
    "gptq_int8": gptq(32, bits=8, is_symmetric=False),
    "gptq_v2": gptq(32, version=2, is_symmetric=False),
    "gptq_int8_v2": gptq(64, bits=8, version=2, is_symmetric=False),
    "fp8_tensor": fp8_tensor(),
    "mxfp8_modelopt": mxfp8({"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "mxfp8_ct": mxfp8(
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp8-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CT_MXFP8}},
        }
    ),
    "f16": Format(None, lambda rng, r, c: {".weight": values(rng, "F16", r, c)}, lambda t: t[".weight"].double()),
    "f32": Format(None, lambda rng, r, c: {".weight": values(rng, "F32", r, c)}, lambda t: t[".weight"].double()),
}


@dataclass(frozen=True)
class Model:
    """A DeepSeek-V3 in one of :data:`FORMATS`, two layers, of which the second has experts, and an MTP layer."""

    format: str = "bf16"
    size: int = 192
    shared: int = 2
    dense: int = 448
    experts: int = 2
    files: int = 2
    plain_mtp: bool = False  # the MTP layer in BF16 whatever the rest is
    seed: int = 0
    heads: int = 420  # divides over every size up to 7, as the vocabulary does

    def config(self) -> dict[str, Any]:
        quantization = FORMATS[self.format].quantization
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_nextn_predict_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": 64,  # else it is hidden_size // heads, which is 0
            "first_k_dense_replace": 1,
            "n_routed_experts": self.experts,
            "n_shared_experts": self.shared,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": self.size,
            "intermediate_size": self.dense,
            "vocab_size": 64 * 420,
            **({"quantization_config": dict(quantization)} if quantization else {}),
        }

    def modules(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each MLP matrix."""
        found = {}
        mlps = {"model.layers.0.mlp.": self.dense}
        for layer in (1, 2):
            mlps |= {f"model.layers.{layer}.mlp.experts.{e}.": self.size for e in range(self.experts)}
            mlps[f"model.layers.{layer}.mlp.shared_experts."] = self.size * self.shared
        for prefix, size in mlps.items():
            found |= {prefix + "gate_proj": (size, HIDDEN), prefix + "up_proj": (size, HIDDEN)}
            found[prefix + "down_proj"] = (HIDDEN, size)
        return found

    def format_of(self, module: str) -> Format:
        return FORMATS["bf16" if self.plain_mtp and ".layers.2." in module else self.format]

    def tensors(self) -> Stored:
        rng = np.random.default_rng(self.seed)
        found = {"model.embed_tokens.weight": values(rng, "BF16", 320, HIDDEN)}
        for layer in (0, 1, 2):
            found[f"model.layers.{layer}.self_attn.o_proj.weight"] = values(rng, "BF16", HIDDEN, 128)
        for module, (rows, cols) in self.modules().items():
            stored = self.format_of(module).store(rng, rows, cols)
            found |= {module + suffix: tensor for suffix, tensor in stored.items()}
        return found

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        (folder / "tokenizer.json").write_text('{"a": "ü"}')
        (folder / "inference").mkdir()
        (folder / "inference" / "generate.py").write_text("print()\n")
        write_files(folder, self.tensors(), self.files)
        return folder


def write_files(folder: Path, tensors: Stored, files: int) -> None:
    """Spread tensors over files with an index, as the hub's checkpoints are."""
    names = list(tensors)
    weight_map = {}
    for index in range(files):
        part = names[index::files]
        name = f"model-{index + 1:05}-of-{files:05}.safetensors"
        save(folder / name, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, name)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)


def save(path: Path, tensors: Stored) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def load(folder: Path) -> Stored:
    """All tensors of a folder, read with the safetensors library as engines do."""
    found: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def stored_of(tensors: Stored, module: str) -> Stored:
    """The tensors of one module by suffix."""
    return {name.removeprefix(module): t for name, t in tensors.items() if name.startswith(module + ".")}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and bits(a).equal(bits(b))
