"""From a launch's settings to the changes that make it tensor parallel, or the reason why not: for every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ep2tp.engines.decision import Decision, decide
from ep2tp.errors import ModelError
from ep2tp.rewrite.parallel_plan import (
    Change,
    LaunchRules,
    Limits,
    Values,
    assumes_expert_parallelism,
    to_tensor_parallel,
)
from ep2tp.settings import Settings


@dataclass(frozen=True)
class Launch:
    """One launch, as its engine describes it.

    Attributes:
        rules: the engine's rules.
        values: settings by field name, those that differ from the engine's defaults.
        model: the model as the user names it.
        gpus: GPUs of the whole job.
        read_config: the model's config.json; None where it cannot be read.
        seam_problem: why this version of the engine is left alone; None where every seam holds.
        devices: the GPUs that the launch names, by their places among those that the process may use, or by their
            UUIDs; empty where it takes the first ones.
        is_one_process_of_many: whether the engine's environment says that each data-parallel rank is started by itself.
    """

    rules: LaunchRules
    values: Values
    model: str
    gpus: int
    read_config: Callable[[], dict[str, Any] | None]
    seam_problem: Callable[[Settings], str | None]
    devices: tuple[int | str, ...] = ()
    is_one_process_of_many: bool = False

    @property
    def sees_own_gpus_only(self) -> bool:
        """Whether other processes of the job may have GPUs that this one is not shown."""
        return self.is_one_process_of_many or any(s.is_bound(self.values) for s in self.rules.one_process_per_rank)


def changes_of(launch: Launch, settings: Settings) -> tuple[Decision, list[Change]]:
    """Decide, and return the changes; nothing is changed yet.

    Raises:
        LaunchError: the launch cannot become tensor parallel; the message names one that can.
        PatchError: no patch matches the model, so its weights could not be checked.
        ModelError: ``EP2TP_STRICT=1`` and the model's config cannot be read.
        SeamError: ``EP2TP_STRICT=1`` and this engine is not one that ep2tp knows.
    """
    trigger = assumes_expert_parallelism(launch.rules, launch.values)
    decision = decide(settings.mode, trigger, launch.gpus, launch.devices, launch.sees_own_gpus_only)
    if not decision.rewrite:
        return decision, []
    # The patches' schema takes longest to import, and a launch that does not ask for expert parallelism needs none.
    from ep2tp.model.facts import is_moe
    from ep2tp.model.families import load_families
    from ep2tp.model.locate import facts_of

    config = launch.read_config()
    if config is None:
        problem = f"the config.json of {launch.model} cannot be read, so its sizes cannot be checked"
        if settings.strict:
            raise ModelError(f"{problem}; name a local folder or a hub id, or run the launch as given with EP2TP=off")
        return decision.leave_alone(problem, is_warning=True), []
    if not is_moe(config):
        return decision.leave_alone(f"{launch.model} has no routed experts"), []
    if found := launch.seam_problem(settings):
        return decision.leave_alone(found, is_warning=True), []
    facts = facts_of(config, launch.model, load_families(settings.patches, settings.patch_path))
    limits = Limits(facts.heads, facts.kv_heads, facts.vocabulary)
    return decision, to_tensor_parallel(launch.rules, launch.values, limits)
