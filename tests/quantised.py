"""Random matrices in each quantisation format, as checkpoint tensors, and what they mean as numbers.

Written from the formats' definitions alone: nothing here knows of slices, ranks or padding, and nothing of ep2tp is
used. ``read`` takes the tensors of a checkpoint and those that an engine loaded alike: both store values the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]  # by suffix of the module's name, such as ".weight_scale"
Config = Mapping[str, Any]

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of 8 neighbouring values is


@dataclass(frozen=True)
class Stored:
    """One way to store a [rows, columns] matrix.

    Attributes:
        name: for test ids.
        quantization: ``quantization_config`` of config.json; None for none.
        make: (generator, rows, columns) to checkpoint tensors.
        read: tensors to float32 values [rows, columns].
    """

    name: str
    quantization: Config | None
    make: Callable[[torch.Generator, int, int], Tensors]
    read: Callable[[Tensors], torch.Tensor]


def _up(size: int, per: int) -> int:
    return -(-size // per)


def _bytes(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def _e4m3(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Any finite E4M3 bit pattern; 0x7F and 0xFF are not numbers."""
    bits = _bytes(random, *shape)
    return torch.where(bits & 0x7F == 0x7F, bits ^ 1, bits).view(torch.float8_e4m3fn)


def _positive_e4m3(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0x20, 0x60, shape, dtype=torch.uint8, generator=random).view(torch.float8_e4m3fn)


def _scales(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=random) + 0.01).to(dtype)


def _exponents(random: torch.Generator, *shape: int) -> torch.Tensor:
    """E8M0 exponents as bytes, 2**-15 to 2**15."""
    return torch.randint(112, 143, shape, dtype=torch.uint8, generator=random)


def _power(exponents: torch.Tensor) -> torch.Tensor:
    return exponents.view(torch.float8_e8m0fnu).float()


def _spread(scales: torch.Tensor, shape: torch.Size, rows: int, cols: int) -> torch.Tensor:
    """One scale for each value: each scale serves ``rows`` x ``cols`` values, the last perhaps fewer."""
    spread = scales.repeat_interleave(rows, -2).repeat_interleave(cols, -1)
    return spread[: shape[0], : shape[1]].float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Values 0 to 15, the low half of a byte before the high one."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _fp4(packed: torch.Tensor) -> torch.Tensor:
    return _E2M1[_nibbles(packed.contiguous()).long()]


def _make_bf16(random: torch.Generator, rows: int, cols: int) -> Tensors:
    return {".weight": torch.randn(rows, cols, generator=random).bfloat16()}


def _read_bf16(tensors: Tensors) -> torch.Tensor:
    return tensors[".weight"].float()


def _make_fp8_block(suffix: str, exponents: bool, size: int, random: torch.Generator, rows: int, cols: int) -> Tensors:
    grid = (_up(rows, size), _up(cols, size))
    scales = _exponents(random, *grid).view(torch.float8_e8m0fnu) if exponents else _scales(random, *grid)
    return {".weight": _e4m3(random, rows, cols), suffix: scales}


def _read_fp8_block(suffix: str, size: int, tensors: Tensors) -> torch.Tensor:
    weight = tensors[".weight"]
    return weight.float() * _spread(tensors[suffix].float(), weight.shape, size, size)


def _make_fp8_channel(random: torch.Generator, rows: int, cols: int) -> Tensors:
    return {".weight": _e4m3(random, rows, cols), ".weight_scale": _scales(random, rows, 1)}


def _read_fp8_channel(tensors: Tensors) -> torch.Tensor:
    return tensors[".weight"].float() * tensors[".weight_scale"]


def _make_int4(group: int, random: torch.Generator, rows: int, cols: int) -> Tensors:
    return {
        ".weight_packed": _bytes(random, rows, 4 * _up(cols, 8)).view(torch.int32),
        ".weight_scale": _scales(random, rows, _up(cols, group), dtype=torch.bfloat16),
        ".weight_shape": torch.tensor([rows, cols]),
    }


def _read_int4(group: int, tensors: Tensors) -> torch.Tensor:
    values = _nibbles(tensors[".weight_packed"].contiguous()).float() - 8
    return values * _spread(tensors[".weight_scale"], values.shape, 1, group)


def _make_nvfp4(names: tuple[str, str, str], random: torch.Generator, rows: int, cols: int) -> Tensors:
    weight, weight_scalar, input_scalar = names
    return {
        weight: _bytes(random, rows, cols // 2),
        ".weight_scale": _positive_e4m3(random, rows, cols // 16),
        weight_scalar: _scales(random),
        input_scalar: _scales(random),
    }


def _read_nvfp4(names: tuple[str, str, str], tensors: Tensors) -> torch.Tensor:
    weight, weight_scalar, _ = names
    values = _fp4(tensors[weight])
    scales = _spread(tensors[".weight_scale"].float(), values.shape, 1, 16)
    scalar = tensors[weight_scalar].reshape(())
    return values * scales * scalar if weight_scalar == ".weight_scale_2" else values * scales / scalar


def _make_mxfp4(weight: str, scale: str, random: torch.Generator, rows: int, cols: int) -> Tensors:
    packed, exponents = _bytes(random, rows, cols // 2), _exponents(random, rows, cols // 32)
    if scale == ".scale":  # DeepSeek-V4's containers
        return {weight: packed.view(torch.int8), scale: exponents.view(torch.float8_e8m0fnu)}
    return {weight: packed, scale: exponents}


def _read_mxfp4(weight: str, scale: str, tensors: Tensors) -> torch.Tensor:
    values = _fp4(tensors[weight])
    return values * _spread(_power(tensors[scale].contiguous()), values.shape, 1, 32)


def _make_mxfp8(random: torch.Generator, rows: int, cols: int) -> Tensors:
    return {".weight": _e4m3(random, rows, cols), ".weight_scale_inv": _exponents(random, rows, cols // 32)}


def _read_mxfp8(tensors: Tensors) -> torch.Tensor:
    weight = tensors[".weight"].float()
    return weight * _spread(_power(tensors[".weight_scale_inv"].contiguous()), weight.shape, 1, 32)


def _make_gptq(group: int, random: torch.Generator, rows: int, cols: int) -> Tensors:
    """Symmetric, as published: every zero point is 8, stored as 7."""
    return {
        ".qweight": _bytes(random, _up(cols, 8), 4 * rows).view(torch.int32),
        ".qzeros": torch.full((_up(cols, group), rows // 8), 0x77777777, dtype=torch.int32),
        ".scales": _scales(random, _up(cols, group), rows, dtype=torch.bfloat16),
    }


def _read_gptq(group: int, tensors: Tensors) -> torch.Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = (tensors[".qweight"][:, None, :] >> shifts[None, :, None] & 15).flatten(0, 1)
    zeros = (tensors[".qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1
    scales = tensors[".scales"]
    offset = (values - zeros.repeat_interleave(group, 0)[: len(values)]).float()
    return (offset * scales.float().repeat_interleave(group, 0)[: len(values)]).t()


def read_gptq_as_marlin(group: int, tensors: Tensors) -> torch.Tensor:
    """As kernels read symmetric checkpoints: zero points are 8, whatever is stored."""
    return _read_gptq(group, {**tensors, ".qzeros": torch.full_like(tensors[".qzeros"], 0x77777777)})


def _make_awq(group: int, random: torch.Generator, rows: int, cols: int) -> Tensors:
    return {
        ".qweight": _bytes(random, cols, rows // 2).view(torch.int32),
        ".qzeros": _bytes(random, _up(cols, group), rows // 2).view(torch.int32),
        ".scales": _scales(random, _up(cols, group), rows, dtype=torch.bfloat16),
    }


def _read_awq(group: int, tensors: Tensors) -> torch.Tensor:
    shifts = torch.tensor([4 * place for place in _AWQ_ORDER], dtype=torch.int32)

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return (packed[:, :, None] >> shifts & 15).flatten(1)

    values, zeros = unpack(tensors[".qweight"]), unpack(tensors[".qzeros"])
    offset = (values - zeros.repeat_interleave(group, 0)[: len(values)]).float()
    return (offset * tensors[".scales"].float().repeat_interleave(group, 0)[: len(values)]).t()


def _compressed(form: str, weights: Config, activations: Config | None = None) -> Config:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": {"symmetric": True, **activations} if activations else None,
        "format": form,
    }
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


def fp8_block(suffix: str = ".weight_scale_inv", size: int = 128, *, exponents: bool = False) -> Stored:
    if suffix == ".weight_scale":
        name = "compressed_fp8_block"
        config = _compressed(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [size, size]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": size, "dynamic": True},
        )
    else:
        name = "fp8_block"
        config = {"quant_method": "fp8", "weight_block_size": [size, size], "activation_scheme": "dynamic"}
    make, read = partial(_make_fp8_block, suffix, exponents, size), partial(_read_fp8_block, suffix, size)
    return Stored(name, config, make, read)


def int4(group: int) -> Stored:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    config = _compressed("pack-quantized", weights)
    return Stored(f"int4_group{group}", config, partial(_make_int4, group), partial(_read_int4, group))


def nvfp4(names: tuple[str, str, str], name: str, config: Config) -> Stored:
    return Stored(name, config, partial(_make_nvfp4, names), partial(_read_nvfp4, names))


def mxfp4(weight: str, scale: str, name: str, config: Config) -> Stored:
    return Stored(name, config, partial(_make_mxfp4, weight, scale), partial(_read_mxfp4, weight, scale))


def gptq(group: int) -> Stored:
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
    return Stored("gptq", config, partial(_make_gptq, group), partial(_read_gptq, group))


def awq(group: int) -> Stored:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Stored("awq", config, partial(_make_awq, group), partial(_read_awq, group))


BF16 = Stored("bf16", None, _make_bf16, _read_bf16)
FP8_BLOCK = fp8_block()
COMPRESSED_FP8_BLOCK = fp8_block(".weight_scale")
COMPRESSED_FP8_CHANNEL = Stored(
    "compressed_fp8_channel",
    _compressed(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
    _make_fp8_channel,
    _read_fp8_channel,
)
INT4_GROUP32, INT4_GROUP128 = int4(32), int4(128)
_FP4_GROUP16 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
COMPRESSED_NVFP4 = nvfp4(
    (".weight_packed", ".weight_global_scale", ".input_global_scale"),
    "compressed_nvfp4",
    _compressed("nvfp4-pack-quantized", _FP4_GROUP16, {**_FP4_GROUP16, "dynamic": "local"}),
)
MODELOPT_NVFP4 = nvfp4(
    (".weight", ".weight_scale_2", ".input_scale"),
    "modelopt_nvfp4",
    {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": 16},
                "input_activations": {"num_bits": 4, "group_size": 16},
            }
        },
    },
)
COMPRESSED_MXFP4 = mxfp4(
    ".weight_packed",
    ".weight_scale",
    "compressed_mxfp4",
    _compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
)
DEEPSEEK_V4_MXFP4 = mxfp4(
    ".weight",
    ".scale",
    "deepseek_v4_mxfp4",
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "scale_fmt": "ue8m0"},
)
MXFP8 = Stored(
    "mxfp8",
    {"quant_method": "mxfp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic"},
    _make_mxfp8,
    _read_mxfp8,
)
GPTQ, AWQ = gptq(128), awq(128)
