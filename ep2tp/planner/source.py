"""Finds the model to plan for: a folder, a config.json, or a hub id, of which only small files and headers are read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.header import StoredTensor, parse_json
from ep2tp.checkpoint.hub import HubSource
from ep2tp.checkpoint.manifest import MANIFEST
from ep2tp.checkpoint.source import LocalSource, Source
from ep2tp.errors import CheckpointError, Ep2tpError, ModelError
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import load_families
from ep2tp.model.locate import MODELOPT, facts_of, with_modelopt
from ep2tp.planner.fields import check_fields
from ep2tp.planner.inventory import Inventory, inventory_from_config, inventory_from_tensors
from ep2tp.settings import Settings


def load_model(model: str, revision: str | None = None) -> tuple[ModelFacts, Inventory]:
    """The facts of a model and what its weights weigh.

    Sizes are exact where safetensors headers can be read (a folder that holds weights, a hub model), and computed from
    the config where there is nothing else.

    Args:
        model: a checkpoint folder or its config.json, a config under another name (nothing beside it is read), or a
            hub id.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError, PatchError: no such model, no experts, or no patch for it.
        CheckpointError: a file of the checkpoint is damaged, or the hub does not answer.
    """
    config, weights = _found(model, revision)
    facts = _facts(config, model)
    with _field_errors(model):
        if weights is None:
            return facts, inventory_from_config(facts)
        inventory = inventory_from_tensors(facts, _tensors(weights))
    if not inventory.expert:
        raise CheckpointError(
            f"{model}: no tensor is named like the experts of patch {facts.family.name!r}; the patch does not fit this "
            "checkpoint (ep2tp patches --model shows the names)"
        )
    return facts, inventory


def load_facts(model: str) -> ModelFacts:
    """The facts of a model alone, found as :func:`load_model` finds it; no header is read.

    Raises:
        ModelError, PatchError, CheckpointError: as there.
    """
    config, _ = _found(model, None)
    return _facts(config, model)


def _found(model: str, revision: str | None) -> tuple[dict[str, Any], Source | None]:
    """The config of a model, and the checkpoint whose headers say what it weighs, where there is one."""
    path = Path(model)
    if path.is_file():
        is_of_folder = path.name == "config.json"
        return _described(LocalSource(path.parent)) if is_of_folder else _config(path, _read(path)), None
    if path.is_dir():
        source = LocalSource(path)
        return _described(source), source if any(path.glob("*.safetensors")) else None
    from huggingface_hub import try_to_load_from_cache

    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ModelError(f"{model}: no such file or folder, and not a hub id (owner/name)")
    try:
        hub = HubSource(model, revision, Path())
    except CheckpointError:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise
        return _described(LocalSource(Path(cached).parent)), None
    return _described(hub), hub if any(name.endswith(".safetensors") for name in hub.sizes) else None


def _facts(config: dict[str, Any], model: str) -> ModelFacts:
    check_fields(config, model)
    settings = Settings.from_environment()
    facts = facts_of(config, model, load_families(settings.patches, settings.patch_path))
    if facts.top_k > facts.experts:
        raise ModelError(f"{model}: config.json has {facts.experts} experts, of which a token uses {facts.top_k}")
    if not isinstance(facts.vocabulary, int | None):
        raise ModelError(f"{model}: config.json has vocab_size={facts.vocabulary!r}; expected a number")
    return facts


@contextmanager
def _field_errors(model: str) -> Iterator[None]:
    """A config is not trusted: a field of the wrong type or length is the config's error, not ep2tp's."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, Ep2tpError):
            raise
        raise ModelError(
            f"{model}: config.json contradicts itself about its layers or attention ({type(error).__name__}: {error})"
        ) from None


def _tensors(source: Source) -> Iterator[StoredTensor]:
    for _, origins, _ in source.files():
        yield from (origin.tensor for origin in origins)


def _described(source: Source) -> dict[str, Any]:
    """config.json, with ModelOpt's hf_quant_config.json where it says nothing about quantisation itself."""
    label = Path(source.label)
    _refuse_rank_files(source)
    text = _text(source, "config.json")
    if text is None:
        raise ModelError(f"{source.label}: has no config.json; name a folder or hub model with one")
    return with_modelopt(_config(label / "config.json", text), label / MODELOPT, _text(source, MODELOPT))


def _refuse_rank_files(source: Source) -> None:
    """A folder of ``ep2tp reshard --layout ranks`` loads as one plan alone: there is nothing to compare."""
    text = _text(source, MANIFEST)
    stored = parse_json(Path(source.label) / MANIFEST, text) if text is not None else {}
    if stored.get("layout") == "ranks":
        name, ranks = shlex.quote(source.label), stored.get("ranks")
        raise ModelError(
            f"{source.label}: ep2tp reshard --layout ranks wrote it for tensor parallelism over {ranks} ranks, and it "
            f"loads in no other way: EP2TP=on vllm serve {name} --tensor-parallel-size {ranks} --load-format ep2tp, or "
            f"EP2TP=on sglang serve --model-path {name} --tp-size {ranks}. For anything else, name the checkpoint "
            "that it was made from"
        )


def _text(source: Source, name: str) -> bytes | None:
    try:
        return source.read_text(name)
    except OSError as error:
        raise ModelError(f"{Path(source.label) / name}: {error.strerror or error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def _config(path: Path, text: bytes) -> dict[str, Any]:
    try:
        return parse_json(path, text)
    except CheckpointError as error:
        raise ModelError(f"{error}; name a Hugging Face config.json") from None
