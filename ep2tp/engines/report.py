"""What ep2tp writes to an engine's log, once per launch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ep2tp import __version__
from ep2tp.settings import Kernel, Settings

if TYPE_CHECKING:
    from ep2tp.engines.decision import Decision
    from ep2tp.model.sharding import ShardPlan
    from ep2tp.rewrite.parallel_plan import Change


def log_launch(
    logger: logging.Logger, decision: Decision, changes: list[Change], plan: ShardPlan | None, settings: Settings
) -> None:
    """Write the table of a launch that was changed or padded, or one line for a launch that was not."""
    from ep2tp.rewrite.report import launch_report

    verb = "rewrote this launch to tensor parallelism" if changes else "left the launch's parallelism as it is"
    title = f"ep2tp {__version__} {verb}: {decision.why}"
    unchecked = plan is not None and bool(plan.unchecked)
    level = logging.WARNING if decision.is_warning or unchecked else logging.INFO
    if changes or unchecked or (plan is not None and (plan.is_padded or plan.left_to_engine)):
        text = launch_report(title, changes, plan, _whose(settings, bool(changes)))
    else:
        text = title + ("" if plan is None else "; nothing to pad")
    logger.log(level, "%s", text, stacklevel=2)  # the line names the plugin


def _whose(settings: Settings, is_rewritten: bool) -> str:
    """Whose kernel runs. With ``auto`` it depends on how a layer is stored once it is loaded, which a worker logs."""
    if settings.kernel is Kernel.EP2TP:
        return "ep2tp's (EP2TP_KERNEL=ep2tp)"
    if settings.takes_kernel(is_rewritten):
        return "the faster one (EP2TP_KERNEL=auto), see 'ep2tp kernel:' once the weights are loaded"
    if settings.kernel is Kernel.AUTO:
        return "the engine's (EP2TP_KERNEL=auto; the faster one in a rewritten launch, or with EP2TP=on)"
    return "the engine's (EP2TP_KERNEL=engine)"
