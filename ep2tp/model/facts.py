"""What a model is: its family, its sizes, and how each class of MLP weights is stored. Read from config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from ep2tp.errors import ModelError
from ep2tp.model.families import ClassName, Family, Size, Tensors, config_parts
from ep2tp.model.formats import Format
from ep2tp.model.quantization import Quantization, read_quantization

_EXPERT_COUNTS = (
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_routed_experts",
)
# Far beyond any model: a config that says more is damaged, and would keep ep2tp busy for hours.
_LARGEST_SIZE = 1 << 24
_LARGEST_COUNT = 1 << 14


@dataclass(frozen=True)
class TensorClass:
    """One class of MLP weights: routed experts, shared experts, or dense MLPs.

    Attributes:
        name: ``routed``, ``shared`` or ``dense``.
        field: the config field that sets its size.
        times: how many of the field's values one stored matrix holds (``n_shared_experts`` for shared experts).
        size: intermediate values of one stored matrix, ``times * config[field]``.
        formats: the formats found over all layers; None stands for one that ep2tp does not know.
    """

    name: ClassName
    field: str
    times: int
    size: int
    formats: tuple[Format | None, ...]

    @property
    def is_known(self) -> bool:
        """Whether ep2tp knows every format of the class."""
        return None not in self.formats

    @property
    def block(self) -> int:
        """Values that no slice may cut, over all formats of the class."""
        return lcm(*(f.block for f in self.formats if f))

    @property
    def padded_block(self) -> int:
        """Values that a slice is a multiple of once it is padded."""
        return lcm(*(f.padded_block for f in self.formats if f))

    @property
    def format_names(self) -> str:
        """Names for a person, such as ``fp8_block128`` or ``bf16, nvfp4``."""
        return ", ".join(sorted({f.name if f else "unknown format" for f in self.formats}))


@dataclass(frozen=True)
class ModelFacts:
    """One MoE model.

    Attributes:
        source: what a message calls the model: a folder or hub name.
        family: its patch.
        matched_by: why that patch.
        config: the parsed config.json.
        hidden: hidden size; ``expert_hidden``: that of the routed experts, where it differs (latent MoE).
        heads: attention heads. kv_heads: key-value heads, or None under multi-head latent attention (MLA).
        vocabulary: tokens, or None where config.json does not say.
        experts, top_k: routed experts of a layer, and those that a token uses.
        classes: the classes of MLP weights that the model has.
        quantization: the format of every module.
    """

    source: str
    family: Family
    matched_by: str
    config: Mapping[str, Any]
    hidden: int
    expert_hidden: int
    layers: int
    heads: int
    kv_heads: int | None
    vocabulary: int | None
    experts: int
    top_k: int
    classes: tuple[TensorClass, ...]
    quantization: Quantization

    def tensor_class(self, name: ClassName) -> TensorClass | None:
        """The class of that name, or None where the model has none."""
        return next((c for c in self.classes if c.name == name), None)


def is_moe(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a model with routed experts."""
    counts = [part.get(key) for part in config_parts(config) for key in _EXPERT_COUNTS]
    return any(isinstance(count, list) or (isinstance(count, int) and count > 1) for count in counts)


def read_config(folder: Path) -> dict[str, Any]:
    """Parse ``config.json`` of a checkpoint folder.

    Raises:
        ModelError: the file is missing, is not JSON, or is not an object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; name a folder with a Hugging Face checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a JSON {type(config).__name__}; expected an object")
    return config


def read_facts(config: Mapping[str, Any], family: Family, matched_by: str, source: str) -> ModelFacts:
    """Read a model's facts from its config with the help of its family's patch.

    Raises:
        ModelError: a field that the patch names is missing, no positive integer, or beyond any model's.
    """
    fields = family.fields
    part = _part_with(config, fields.routed.field, family, source)
    reader = _Reader(part, source)
    quantization = read_quantization(config if "quantization_config" in config else part)
    layers = reader.positive(fields.layers, _LARGEST_COUNT)
    hidden = reader.positive(fields.hidden)
    has_expert_hidden = fields.expert_hidden is not None and reader.value(fields.expert_hidden)
    sizes: list[tuple[ClassName, Size | None, Tensors | None]] = [
        ("routed", fields.routed, family.tensors.routed),
        ("shared", fields.shared, family.tensors.shared),
        ("dense", fields.dense, family.tensors.dense),
    ]
    classes = []
    for name, size, tensors in sizes:
        if size is None or tensors is None or not reader.has_class(size):
            continue
        times = reader.positive(size.times) if size.times else 1
        value = reader.positive(size.field) * times
        found = _formats(family, tensors, quantization, layers)
        classes.append(TensorClass(name, reader.name(size.field), times, value, found))
    uses_mla = bool(part.get("kv_lora_rank"))
    kv_heads = None if uses_mla else reader.value(fields.kv_heads)
    return ModelFacts(
        source=source,
        family=family,
        matched_by=matched_by,
        config=config,
        hidden=hidden,
        expert_hidden=reader.positive(fields.expert_hidden or ()) if has_expert_hidden else hidden,
        layers=layers,
        heads=reader.positive(("num_attention_heads",)),
        kv_heads=kv_heads,
        vocabulary=part.get("vocab_size"),
        experts=reader.positive(fields.experts, _LARGEST_COUNT),
        top_k=reader.positive(fields.top_k),
        classes=tuple(classes),
        quantization=quantization,
    )


def _part_with(config: Mapping[str, Any], names: tuple[str, ...], family: Family, source: str) -> Mapping[str, Any]:
    fitting = [part for part in config_parts(config) if any(part.get(name) is not None for name in names)]
    if not fitting:
        wanted = " or ".join(map(repr, names))
        raise ModelError(
            f"{source}: config.json has no {wanted}, which patch {family.name!r} reads; is it the right patch?"
        )
    return fitting[-1]


def _formats(family: Family, tensors: Tensors, quantization: Quantization, layers: int) -> tuple[Format | None, ...]:
    """The formats of a class over all layers, and over one past the last, where an MTP layer is numbered."""
    names = {*tensors.gate, *tensors.gate_up, *tensors.down}
    found: dict[str, Format | None] = {}
    for layer in range(layers + 1):
        for name in names:
            for prefix in family.tensors.prefixes:
                module = prefix + name.replace("{layer}", str(layer)).replace("{expert}", "0")
                stored = quantization.choose(module)
                found[stored.name if stored else ""] = stored
    return tuple(found.values())


@dataclass(frozen=True)
class _Reader:
    config: Mapping[str, Any]
    source: str

    def name(self, names: tuple[str, ...]) -> str:
        """The first of a field's names that the config has."""
        return next((name for name in names if self.config.get(name) is not None), names[0])

    def value(self, names: tuple[str, ...]) -> Any:
        return self.config.get(self.name(names)) if names else None

    def has_class(self, size: Size) -> bool:
        needed = (size.field, size.times, size.only_if)
        return all(self.value(names) for names in needed if names is not None)

    def positive(self, names: tuple[str, ...], most: int = _LARGEST_SIZE) -> int:
        value = self.value(names)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ModelError(
                f"{self.source}: config.json has {self.name(names)}={value!r}; expected a positive integer up to {most}"
            )
        return value
