"""Finds a model's config.json on this machine: a folder, a config file, or a model in the hub's local cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep2tp.errors import ModelError, PatchError
from ep2tp.model.facts import ModelFacts, is_moe, read_config, read_facts
from ep2tp.model.families import Family, find_family


def find_config(model: str) -> dict[str, Any]:
    """Read the config.json of ``model``: a checkpoint folder, a config.json, or a hub id in the local cache.

    Raises:
        ModelError: it is none of these, or the file cannot be read.
    """
    path = Path(model)
    if path.is_dir():
        return read_config(path)
    if path.is_file():
        return read_config(path.parent) if path.name == "config.json" else _refuse(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        cached = None
    return read_config(Path(cached).parent) if isinstance(cached, str) else _refuse(model)


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
        ModelError: a config without routed experts, or without what the patch needs.
        PatchError: no patch matches.
    """
    if not is_moe(config):
        raise ModelError(f"{source}: config.json names no routed experts (model_type {config.get('model_type')!r})")
    found = find_family(config, families)
    if found is None:
        raise PatchError(
            f"{source}: no patch in force matches architectures {config.get('architectures')}, model_type "
            f"{config.get('model_type')!r}, so its expert weights cannot be checked. See EP2TP_PATCHES; a patch of "
            "your own goes into a folder of EP2TP_PATCH_PATH (docs/patches.md); EP2TP=off runs a launch as given"
        )
    return read_facts(config, found[0], found[1], source)


def _refuse(model: str) -> dict[str, Any]:
    raise ModelError(f"{model}: not a checkpoint folder, a config.json, or a hub model in this machine's cache")
