"""Finds a model's config.json on this machine: a folder, a config file, or a model in the hub's local cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep2tp.errors import ModelError, NoExpertsError, PatchError
from ep2tp.model.facts import ModelFacts, is_moe, read_config, read_facts
from ep2tp.model.families import Family, find_family

MODELOPT = "hf_quant_config.json"
"""The file in which older exports of ModelOpt keep what others say in config.json."""
_LARGEST_TEXT = 100_000_000  # bytes, as of every small file of a checkpoint


def find_config(model: str) -> dict[str, Any]:
    """The config of ``model``: a checkpoint folder, a config.json, or a hub id in the local cache.

    Read from config.json, and :data:`MODELOPT` beside it.

    Raises:
        ModelError: it is none of these, or a file cannot be read.
    """
    path = Path(model)
    if path.is_dir():
        return _described(path)
    if path.is_file():
        return _described(path.parent) if path.name == "config.json" else _refuse(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        cached = None
    return _described(Path(cached).parent) if isinstance(cached, str) else _refuse(model)


def with_modelopt(config: dict[str, Any], path: Path, text: bytes | None) -> dict[str, Any]:
    """A config with ModelOpt's quantisation, where it says nothing about quantisation itself.

    Args:
        config: the parsed config.json.
        path: what messages call the file :data:`MODELOPT`.
        text: its contents, or None where there is none.

    Raises:
        ModelError: they are no JSON object.
    """
    if config.get("quantization_config") is not None or text is None:
        return config
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a JSON {type(found).__name__}; expected an object")
    return config | {"quantization_config": {"quant_method": "modelopt"} | found}


def find_facts(model: str, families: Mapping[str, Family]) -> ModelFacts:
    """The facts of ``model``, which may be anything that :func:`find_config` takes.

    Raises:
        ModelError: no config, or a config without routed experts.
        PatchError: no patch matches.
    """
    return facts_of(find_config(model), model, families)


def facts_of(config: Mapping[str, Any], source: str, families: Mapping[str, Family]) -> ModelFacts:
    """The facts of a model with this config, which messages call ``source``.

    Raises:
        NoExpertsError: a config without routed experts.
        ModelError: a config without what the patch needs.
        PatchError: no patch matches.
    """
    if not is_moe(config):
        raise NoExpertsError(f"{source}: config.json names no routed experts (model_type {config.get('model_type')!r})")
    found = find_family(config, families)
    if found is None:
        raise PatchError(
            f"{source}: no patch in force matches architectures {config.get('architectures')}, model_type "
            f"{config.get('model_type')!r}, so its expert weights cannot be checked. See EP2TP_PATCHES; a patch of "
            "your own goes into a folder of EP2TP_PATCH_PATH (docs/patches.md); EP2TP=off runs a launch as given"
        )
    return read_facts(config, found[0], found[1], source)


def _described(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    path = folder / MODELOPT
    return with_modelopt(config, path, _read_inside(folder, path) if path.is_file() else None)


def _read_inside(folder: Path, path: Path) -> bytes:
    """A small file of a folder. The hub's cache links each file to its blobs, which is fine; no other link is."""
    folder, real = folder.resolve(), path.resolve()
    model = folder.parent.parent
    blobs = (model / "blobs", model.parent / "blobs") if folder.parent.name == "snapshots" else ()
    if not any(root in real.parents for root in (folder, *blobs)):
        raise ModelError(f"{path}: leads to {real}, outside of {folder}; refused")
    if real.stat().st_size > _LARGEST_TEXT:
        raise ModelError(f"{path}: larger than {_LARGEST_TEXT} bytes; refused")
    try:
        return real.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def _refuse(model: str) -> dict[str, Any]:
    raise ModelError(f"{model}: not a checkpoint folder, a config.json, or a hub model in this machine's cache")
