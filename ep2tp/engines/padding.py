"""What every engine's padding shares: planning a launch's weights, growing a config, and the note for its workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.reader import check_folder
from ep2tp.errors import ModelError, PatchError
from ep2tp.model.facts import ModelFacts, is_moe, read_facts
from ep2tp.model.families import find_family, load_families
from ep2tp.model.locate import facts_of
from ep2tp.model.sharding import ShardPlan, plan_shards
from ep2tp.settings import Settings


def facts_of_launch(config: Mapping[str, Any], model: str, settings: Settings, is_rewritten: bool) -> ModelFacts | None:
    """The facts of a launch's model.

    Returns:
        None for a model without experts; and, unless the launch was rewritten, for one that no patch matches or whose
        config ep2tp cannot read.

    Raises:
        ModelError: the launch was rewritten, and the config lacks what the patch needs.
    """
    if not is_moe(config):
        return None
    families = load_families(settings.patches, settings.patch_path)
    if find_family(config, families) is None:
        return None
    try:
        return facts_of(config, model, families)
    except ModelError:
        if is_rewritten:
            raise
        return None


def refuse_unchecked(plan: ShardPlan) -> None:
    """Refuse a rewritten launch whose slices might cut a scale group.

    Raises:
        ModelError: a class of weights is stored in a way that ep2tp does not know.
    """
    for name, why in plan.unchecked.items():
        raise ModelError(
            f"{plan.facts.source}: {name} weights are {why}, and slices over {plan.ranks} ranks might cut a scale "
            "group; use fewer ranks, or run the launch as given with EP2TP=off"
        )


def needs_padding(plan: ShardPlan) -> str:
    """Why a launch cannot do without padding, as the beginning of a message."""
    sizes = ", ".join(f"{field} {before} -> {after}" for field, (before, after) in plan.fields.items())
    return f"{plan.facts.source} needs padding over {plan.ranks} ranks ({sizes})"


def check_local_files(folder: Path, load_format: str, plan: ShardPlan) -> None:
    """Check the headers of a local safetensors checkpoint now; all else is checked as it streams.

    Raises:
        CheckpointError: a tensor does not fit the model's config.
    """
    if load_format not in ("dummy", "pt", "npcache") and any(folder.glob("*.safetensors")):
        check_folder(folder, plan)


def note_of(plan: ShardPlan, dense_ranks: int) -> dict[str, Any]:
    """What a worker needs to make the plan again."""
    return {
        "family": plan.facts.family.name,
        "matched_by": plan.facts.matched_by,
        "source": plan.facts.source,
        "config": dict(plan.facts.config),
        "ranks": plan.ranks,
        "dense_ranks": dense_ranks,
        "routed_ranks": plan.splits["routed"].ranks if "routed" in plan.splits else None,
        "left_to_engine": dict(plan.left_to_engine),
        "multiples": dict(plan.multiples),
    }


def plan_of_note(note: Mapping[str, Any], settings: Settings) -> ShardPlan:
    """The plan by which a worker's model was built.

    Raises:
        PatchError: this worker does not have the patch that the launch used.
    """
    families = load_families(settings.patches, settings.patch_path)
    if note["family"] not in families:
        raise PatchError(
            f"{note['source']} was planned with patch {note['family']!r}, which this worker does not have; give every "
            "node the same EP2TP_PATCHES and EP2TP_PATCH_PATH"
        )
    facts = read_facts(note["config"], families[note["family"]], note["matched_by"], note["source"])
    ranks_of = {name: note[name] for name in ("dense_ranks", "routed_ranks")}
    return plan_shards(facts, note["ranks"], note["left_to_engine"], multiples=note["multiples"], **ranks_of)


def grow(configs: Iterable[Any], plan: ShardPlan, engine: str) -> None:
    """Write the padded sizes into an engine's config objects of one model, in place; idempotent.

    Raises:
        ModelError: none of them has a field that config.json has.
    """
    configs = list(configs)
    for field, (before, after) in plan.fields.items():
        if not any(getattr(config, field, None) in (before, after) for config in configs):
            raise ModelError(
                f"{plan.facts.source}: {engine}'s config object has no {field}={before}, which config.json has, so "
                "ep2tp cannot pad it; use a tensor-parallel size that divides it, or EP2TP=off"
            )
        for config in configs:
            if getattr(config, field, None) == before:
                setattr(config, field, after)
