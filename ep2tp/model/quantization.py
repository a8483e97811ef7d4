"""Reads ``quantization_config``: which :class:`~ep2tp.model.formats.Format` each module of a model is stored in.

The config says a default, groups of modules, and modules left unquantised; the names follow no common rule, so each
quantisation method has its reader. A method that is not known gives no format: ep2tp then says so and leaves it alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Any

from ep2tp.errors import ModelError
from ep2tp.model import formats
from ep2tp.model.formats import PLAIN, Format

Config = Mapping[str, Any]
Chooser = Callable[[str], Format | None]

_NAMES_KEPT = 1024


@dataclass(frozen=True)
class Quantization:
    """The formats of one checkpoint.

    Attributes:
        method: ``quant_method`` of the config, or ``none``.
        choose: the format of a module by its name (without ``.weight``); None where ep2tp does not know it.
    """

    method: str
    choose: Chooser


def read_quantization(config: Config) -> Quantization:
    """The quantisation of a model from its config.json (or the text part of it).

    Args:
        config: the parsed config; ``quantization_config`` (or ``compression_config``) may be absent.

    Raises:
        ModelError: the quantization_config contradicts itself, lacks a size that slicing needs, or is not of the types
            that its method defines.
    """
    quant = config.get("quantization_config") or config.get("compression_config")
    if quant is None:
        return Quantization("none", lambda module: PLAIN)
    _mapping(quant, "quantization_config")
    method = str(quant.get("quant_method", "")).lower().replace("_", "-")
    reader = _READERS.get(method)
    if reader is None:
        return Quantization(method or "unknown", lambda module: None)
    try:
        choose = lru_cache(_NAMES_KEPT)(reader(quant, config))  # a module has several tensors, one after the other
        return Quantization(method, choose)
    except _UnsliceableError as reason:
        return Quantization(f"{method} ({reason})", lambda module: None)


class _UnsliceableError(Exception):
    """A layout that no slice can keep whole; only launches that would slice it are refused."""


def _fp8(quant: Config, config: Config) -> Chooser:
    block = quant.get("weight_block_size")
    stored = formats.fp8_tensor() if block is None else formats.fp8_block(*_two_sizes(block))
    skipped = _names(quant, "modules_to_not_convert", "ignored_layers")
    # DeepSeek-V4 and V4.1 keep their routed experts in MXFP4 under quant_method fp8, also where they do not say so.
    default = "fp4" if str(config.get("model_type", "")).startswith("deepseek_v4") else "fp8"
    expert_dtype = config.get("expert_dtype") or quant.get("expert_dtype") or default
    routed = formats.mxfp4() if expert_dtype == "fp4" else stored

    def choose(module: str) -> Format:
        if _is_listed(module, skipped):
            return PLAIN
        return routed if ".experts." in module else stored

    return choose


def _compressed_tensors(quant: Config, config: Config) -> Chooser:
    found = _mapping(quant.get("config_groups") or {}, "config_groups")
    groups = {name: _mapping(group, f"config_groups.{name}") for name, group in found.items()}
    formats_of = {name: _compressed_group(name, group, quant) for name, group in groups.items()}
    targets = [(_targets(group, "targets"), formats_of[name]) for name, group in groups.items()]
    default = next((formats_of[n] for n, group in groups.items() if "Linear" in _names(group, "targets")), PLAIN)
    is_ignored = _targets(quant, "ignore")

    def choose(module: str) -> Format | None:
        if is_ignored(module):
            return PLAIN
        # A target that names the module beats one that names its class, whichever group comes first.
        return next((stored for is_target, stored in targets if is_target(module)), default)

    return choose


def _compressed_group(name: str, group: Config, quant: Config) -> Format | None:
    if not group.get("weights"):
        return PLAIN
    weights = _mapping(group["weights"], f"config_groups.{name}.weights")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    packing = str(group.get("format") or quant.get("format") or "")
    size = weights.get("group_size")
    if kind == "float" and bits == 4:
        return formats.mxfp4() if "mxfp4" in packing or size == 32 else formats.nvfp4()
    if kind == "float" and bits == 8:
        if strategy == "block":
            return formats.fp8_block(*_two_sizes(weights.get("block_structure")))
        if strategy == "group" and size == 32:
            return formats.mxfp8()
        return {"channel": formats.fp8_channel(), "tensor": formats.fp8_tensor()}.get(str(strategy))
    if kind == "int" and packing == "pack-quantized" and bits in _PACKED_BITS:
        if strategy != "group" or not isinstance(size, int) or size < 1:
            raise _UnsliceableError(
                f"config_groups.{name}: packed integers with strategy={strategy!r}, group_size={size!r}"
            )
        if not weights.get("symmetric", True):
            return None
        return formats.int_packed(bits, size)
    return None


def _modelopt(quant: Config, config: Config) -> Chooser:
    quant = _mapping(quant.get("quantization", quant), "quantization")
    algorithm = str(quant.get("quant_algo", "")).upper()
    stored = {
        "NVFP4": formats.nvfp4(),
        "W4A16_NVFP4": formats.nvfp4(),
        "FP8": formats.fp8_tensor(),
        "FP8_PB_WO": formats.fp8_block(),
        "MXFP8": formats.mxfp8(),
    }.get(algorithm)
    skipped = _names(quant, "ignore", "exclude_modules")
    patterns = [re.compile(translate(name)) for name in skipped]

    def choose(module: str) -> Format | None:
        parents = _parents(module)
        is_skipped = any(pattern.match(part) for pattern in patterns for part in parents)
        return PLAIN if is_skipped or _is_listed(module, skipped) else stored  # older exports list parts of paths

    return choose


def _mxfp8(quant: Config, config: Config) -> Chooser:
    """MiniMax-M3's name of MXFP8; M3.1 keeps its routed experts in NVFP4 under it, and says so."""
    routed = formats.nvfp4() if str(quant.get("moe_quant_algo", "")).upper() == "NVFP4" else formats.mxfp8()
    stored = formats.mxfp8()
    skipped = _names(quant, "modules_to_not_convert", "ignored_layers")

    def choose(module: str) -> Format:
        if _is_listed(module, skipped):
            return PLAIN
        return routed if ".experts." in module else stored

    return choose


def _mxfp4(quant: Config, config: Config) -> Chooser:
    skipped = _names(quant, "modules_to_not_convert")
    stored = formats.mxfp4()
    return lambda module: stored if ".experts" in module and not _is_listed(module, skipped) else PLAIN


def _awq(quant: Config, config: Config) -> Chooser:
    bits, group = _positive(quant, "bits", "w_bit"), _positive(quant, "group_size", "q_group_size")
    stored = formats.awq(bits, group) if bits in _PACKED_BITS else None
    skipped = _names(quant, "modules_to_not_convert")
    return lambda module: PLAIN if _is_listed(module, skipped) else stored


def _gptq(quant: Config, config: Config) -> Chooser:
    if quant.get("desc_act"):
        raise _UnsliceableError("desc_act=true: activation order scatters each group over all columns")
    bits, group = _positive(quant, "bits"), _positive(quant, "group_size")
    version = 2 if quant.get("checkpoint_format") == "gptq_v2" else 1
    stored = formats.gptq(bits, group, version) if bits in _PACKED_BITS else None
    skipped = _names(quant, "modules_to_not_convert")
    return lambda module: PLAIN if _is_listed(module, skipped) else stored


_PACKED_BITS = (4, 8)  # the others that exist, 2 and 3, are not checked

_READERS: dict[str, Callable[[Config, Config], Chooser]] = {
    "fp8": _fp8,
    "deepseek-v4-fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt-fp4": _modelopt,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "awq-marlin": _awq,
    "gptq": _gptq,
    "gptq-marlin": _gptq,
}


_LARGEST_SIZE = 1 << 24  # of a group or block; anything near it is nonsense
_LONGEST_PATTERN = 4096
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")


def _mapping(value: Any, name: str) -> Config:
    if not isinstance(value, Mapping):
        raise ModelError(f"quantization_config: {name}={value!r:.80}; expected an object")
    return value


def _two_sizes(block: Any) -> tuple[int, int]:
    is_pair = isinstance(block, Sequence) and len(block) == 2
    if not is_pair or not all(isinstance(b, int) and 0 < b <= _LARGEST_SIZE for b in block):
        raise ModelError(f"quantization_config: block size {block!r}; expected two positive integers [rows, columns]")
    return block[0], block[1]


def _positive(quant: Config, *names: str) -> int:
    value = next((quant[name] for name in names if name in quant), None)
    if not isinstance(value, int) or not 0 < value <= _LARGEST_SIZE:
        raise _UnsliceableError(f"{names[0]}={value!r}: one group over all columns, or none")
    return value


def _names(quant: Config, *keys: str) -> tuple[str, ...]:
    found: list[str] = []
    for key in keys:
        names = quant.get(key) or ()
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"quantization_config: {key}={names!r:.80}; expected a list of names")
        found.extend(names)
    return tuple(found)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_listed(module: str, names: tuple[str, ...]) -> bool:
    """Whether a skip list names the module, a parent of it, or a part of its path."""
    return any(f".{name}." in f".{module}." for name in names)


def _targets(quant: Config, key: str) -> Callable[[str], bool]:
    """compressed-tensors' rule: ``re:`` is a regular expression from the start, anything else the exact name."""
    names = _names(quant, key)
    exact = frozenset(name for name in names if not name.startswith("re:"))
    patterns = [_pattern(name[3:], key) for name in names if name.startswith("re:")]
    return lambda module: module in exact or any(pattern.match(module) for pattern in patterns)


def _pattern(text: str, key: str) -> re.Pattern[str]:
    """A pattern of an untrusted config: one with a repeated group could keep a match busy for years."""
    if len(text) > _LONGEST_PATTERN or _REPEATED_GROUP.search(text):
        raise ModelError(
            f"quantization_config: {key} has the pattern {text!r:.80}; refused, as it repeats a group or is longer "
            f"than {_LONGEST_PATTERN} characters, and so could take forever to match"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"quantization_config: {key} has the pattern {text!r:.80}, which is none: {error}") from None
