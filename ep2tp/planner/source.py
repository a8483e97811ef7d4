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
    path = Path(model)
    if path.is_file():
        is_of_folder = path.name == "config.json"
        return _computed(_described(LocalSource(path.parent)) if is_of_folder else _config(path, _read(path)), model)
    if path.is_dir():
        source = LocalSource(path)
        config = _described(source)
        has_weights = any(path.glob("*.safetensors"))
        return _exact(config, model, _tensors(source)) if has_weights else _computed(config, model)
    from huggingface_hub import try_to_load_from_cache

    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ModelError(f"{model}: no such file or folder, and not a hub id (owner/name)")
    try:
        hub = HubSource(model, revision, Path())
    except CheckpointError:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise
        return _computed(_described(LocalSource(Path(cached).parent)), model)
    config = _described(hub)
    has_weights = any(name.endswith(".safetensors") for name in hub.sizes)
    return _exact(config, model, _tensors(hub)) if has_weights else _computed(config, model)


def _computed(config: dict[str, Any], model: str) -> tuple[ModelFacts, Inventory]:
    facts = _facts(config, model)
    with _field_errors(model):
        return facts, inventory_from_config(facts)


def _exact(config: dict[str, Any], model: str, tensors: Iterator[StoredTensor]) -> tuple[ModelFacts, Inventory]:
    facts = _facts(config, model)
    with _field_errors(model):
        inventory = inventory_from_tensors(facts, tensors)
    if not inventory.expert:
        raise CheckpointError(
            f"{model}: no tensor is named like the experts of patch {facts.family.name!r}; the patch does not fit this "
            "checkpoint (ep2tp patches --model shows the names)"
        )
    return facts, inventory


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
            f"EP2TP=on sglang serve --model-path {name} --tp-size {ranks}. To compare plans, name the checkpoint that "
            "it was made from"
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
