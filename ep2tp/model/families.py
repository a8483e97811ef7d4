"""Model families: reads the patch files, one TOML each, that say how a family's experts are named, sized and stored.

The schema below *is* the patch format; unknown keys are errors. ``docs/patches.md`` explains each key with an example.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ep2tp.errors import PatchError

Role = Literal["gate", "up", "down", "gate_up"]
ClassName = Literal["routed", "shared", "dense"]

_ROUTED = re.compile(r"(?:^|\.)experts\.(?!(?:gate|router)\.|.*(?:e_score_correction|router_bias|shared_expert))")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


FieldName = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
"""A field of config.json: its name, or a list of its names, of which a config's first one counts."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Match(_Strict):
    """Which models a patch is for: any of these names in config.json, at the top or in its text part."""

    architectures: tuple[str, ...] = Field(min_length=1)
    model_types: tuple[str, ...] = Field(min_length=1)


class Size(_Strict):
    """A size of the model: ``field`` of the config, times the value of the field ``times`` where given.

    Where ``only_if`` names a field, the class exists only in models that have it, and not as 0, false or an empty list.
    """

    field: FieldName
    times: FieldName | None = None
    only_if: FieldName | None = None


class Fields(_Strict):
    """Where config.json keeps the numbers. Absent fields of a config mean that the class does not exist."""

    routed: Size
    shared: Size | None = None
    dense: Size | None = None
    experts: FieldName
    top_k: FieldName
    hidden: FieldName = ("hidden_size",)
    expert_hidden: FieldName | None = None
    layers: FieldName = ("num_hidden_layers",)
    kv_heads: FieldName = ("num_key_value_heads",)


class Tensors(_Strict):
    """Names of one class's matrices.

    Each name is a module path in which ``{layer}`` and ``{expert}`` stand for numbers; a tensor is named by the module
    and a suffix of its format (``.weight``, ``_blocks``). ``gate_up`` is for matrices stored as one, in ``order``. A
    routed name without ``{expert}`` is a fused tensor with a leading expert axis. ``transposed`` lists the suffixes of
    fused tensors that are stored [expert, input, output] (``""`` is the bare parameter).
    """

    gate: tuple[str, ...] = ()
    up: tuple[str, ...] = ()
    gate_up: tuple[str, ...] = ()
    down: tuple[str, ...] = Field(min_length=1)
    order: Literal["halves", "interleaved"] = "halves"
    transposed: tuple[str, ...] = ()


class TensorNames(_Strict):
    """Names per class."""

    prefixes: tuple[str, ...] = ("",)
    routed: Tensors
    shared: Tensors | None = None
    dense: Tensors | None = None


class Ledger(_Strict):
    """Why the patch exists, where its facts come from, and when it can go."""

    why: str
    how: str
    upstream: tuple[str, ...] = Field(min_length=1)
    retire_when: str


class Family(_Strict):
    """One patch file."""

    name: str
    title: str
    match: Match
    fields: Fields
    tensors: TensorNames
    expert_parallel: str
    hazards: tuple[str, ...] = ()
    exact_in: Mapping[Literal["vllm", "sglang"], Mapping[ClassName, str]] = Field(default_factory=dict)
    checked: Mapping[Literal["vllm", "sglang"], tuple[str, ...]]
    ledger: Ledger

    @cached_property
    def name_patterns(self) -> tuple[tuple[re.Pattern[str], ClassName, Role, bool], ...]:
        """A pattern for each matrix name, and whether it is fused; what follows a match is the component's suffix."""
        found: list[tuple[re.Pattern[str], ClassName, Role, bool]] = []
        prefix = "|".join(re.escape(p) for p in self.tensors.prefixes)
        classes: tuple[ClassName, ...] = ("routed", "shared", "dense")
        roles: tuple[Role, ...] = ("gate_up", "gate", "up", "down")
        for class_name in classes:
            tensors: Tensors | None = getattr(self.tensors, class_name)
            if tensors is None:
                continue
            for role in roles:
                for name in getattr(tensors, role):
                    body = re.escape(name).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
                    is_fused = class_name == "routed" and "{expert}" not in name
                    found.append((re.compile(rf"(?:{prefix}){body}(?=$|[._])"), class_name, role, is_fused))
        return tuple(found)

    def classify(self, tensor: str) -> Matrix | None:
        """Which matrix a checkpoint tensor belongs to, or None for all that is not an MLP weight."""
        for pattern, class_name, role, is_fused in self.name_patterns:
            if found := pattern.match(tensor):
                return Matrix(class_name, role, found.group(), tensor[found.end() :], is_fused)
        return None


@dataclass(frozen=True)
class Matrix:
    """A tensor's place.

    Attributes:
        class_name: routed, shared or dense.
        role: which projection of the MLP.
        module: the module that owns it.
        suffix: what follows the module's name.
        is_fused: whether all experts of a layer are one tensor, with the expert axis in front.
    """

    class_name: ClassName
    role: Role
    module: str
    suffix: str
    is_fused: bool


def looks_routed(tensor: str) -> bool:
    """Whether a tensor is a routed expert's by its name alone, whichever patch knows it: not a router, nor its bias.

    Example:
        >>> looks_routed("model.layers.3.mlp.experts.gate_up_proj"), looks_routed("model.layers.3.mlp.gate.weight")
        (True, False)
    """
    return _ROUTED.search(tensor) is not None


def config_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config and, for multimodal models, the text part of it, in which the language model's sizes are."""
    nested = [config.get(key) for key in ("text_config", "language_config", "llm_config")]
    return [config, *(part for part in nested if isinstance(part, Mapping))]


def load_family(path: Path) -> Family:
    """Read and check one patch file.

    Raises:
        PatchError: the file is not TOML, a key is missing, unknown or of the wrong type (all of them are named), or
            the patch is not named like its file.
    """
    try:
        family = Family.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PatchError(f"{path}: not a TOML file: {error}") from None
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise PatchError(f"{path}: does not follow the patch format:\n" + "\n".join(lines)) from None
    if family.name != path.stem:
        raise PatchError(f"{path}: name = {family.name!r}; a patch is named like its file: {path.stem!r}")
    return family


def load_families(selection: str = "all", folders: Iterable[Path] = ()) -> dict[str, Family]:
    """The patches in force, by name, in the order in which they are tried: the user's first.

    Args:
        selection: ``EP2TP_PATCHES``: ``all``, ``none``, ``name,name`` (only these) or ``-name,-name`` (all but these).
        folders: the user's folders of patch files (``EP2TP_PATCH_PATH``); the first that has a name wins, also over
            a built-in one.

    Raises:
        PatchError: a patch file is invalid, or ``selection`` names a patch that does not exist.
    """
    families: dict[str, Family] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.toml")):
            families.setdefault(path.stem, load_family(path))
    return _select(families | {name: f for name, f in _built_in().items() if name not in families}, selection)


@lru_cache(maxsize=1)
def _built_in() -> dict[str, Family]:
    with resources.as_file(resources.files("ep2tp") / "patches") as folder:
        return {path.stem: load_family(path) for path in sorted(folder.glob("*.toml"))}


def _select(families: dict[str, Family], selection: str) -> dict[str, Family]:
    names = [name.strip() for name in selection.split(",") if name.strip()]
    if names in ([], ["all"]):
        return families
    if names == ["none"]:
        return {}
    removed = {name[1:] for name in names if name.startswith("-")}
    kept = {name for name in names if not name.startswith("-") and name != "all"}
    if unknown := (removed | kept) - set(families):
        raise PatchError(f"EP2TP_PATCHES names {', '.join(sorted(unknown))}; there are: {', '.join(sorted(families))}")
    return {name: f for name, f in families.items() if (not kept or name in kept) and name not in removed}


def find_family(config: Mapping[str, Any], families: Mapping[str, Family]) -> tuple[Family, str] | None:
    """The family that a config belongs to, with the reason.

    The top of the config beats its text part, and model_type beats architecture: Kimi-K2 says ``kimi_k2`` and
    DeepSeek-V3's architecture, Kimi-K2.5 says so in its text part.
    """
    for part in config_parts(config):
        for family in families.values():
            if part.get("model_type") in family.match.model_types:
                return family, f"model_type {part['model_type']}"
        for family in families.values():
            for name in part.get("architectures") or ():
                if name in family.match.architectures:
                    return family, f"architecture {name}"
    return None
