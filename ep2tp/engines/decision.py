"""Whether a launch is rewritten, and why: the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep2tp.planner.topology import links_of_job
from ep2tp.rewrite.parallel_plan import Setting
from ep2tp.settings import Mode


@dataclass(frozen=True)
class Decision:
    """What becomes of a launch.

    Attributes:
        rewrite: whether it is rewritten.
        why: the reason in words.
        asked: whether it asks for expert parallelism at all.
        is_warning: whether it should have been rewritten and could not be.
    """

    rewrite: bool
    why: str
    asked: bool = True
    is_warning: bool = False

    def leave_alone(self, because: str, is_warning: bool = False) -> Decision:
        """This decision turned down, for another reason."""
        return Decision(False, f"{self.why}, but {because}", self.asked, is_warning)


def decide(
    mode: Mode,
    trigger: Setting | None,
    gpus: int,
    devices: Sequence[int | str] = (),
    sees_own_gpus_only: bool = False,
) -> Decision:
    """Decide for a launch that asks for expert parallelism by ``trigger`` (None: it does not) on ``gpus`` GPUs.

    ``devices`` and ``sees_own_gpus_only`` are for :func:`ep2tp.planner.topology.links_of_job`.
    """
    if trigger is None:
        return Decision(False, "the launch does not ask for expert parallelism", asked=False)
    asked = f"{trigger.flags[0]} on {gpus} GPU{'s' if gpus > 1 else ''}"
    if mode is Mode.OFF:
        return Decision(False, f"{asked}; EP2TP=off")
    if gpus == 1:
        return Decision(False, f"{asked}: one GPU holds every expert whole either way")
    if mode is Mode.ON:
        return Decision(True, f"{asked}; EP2TP=on")
    links = links_of_job(gpus, devices, sees_own_gpus_only)
    return Decision(not links.all_nvlink, f"{asked}; EP2TP=auto and {links.why}")
