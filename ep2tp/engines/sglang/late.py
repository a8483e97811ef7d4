"""Launches that SGLang resolved before it loaded plugins: some of those that are started from Python.

``sglang serve`` and ``Engine(...)`` load plugins first. A ``ServerArgs`` that a program makes and starts in another way
is resolved before that, and then it cannot be rewritten any more. The workers load plugins, too, and can say so.
"""

from __future__ import annotations

import logging
from typing import Any

from ep2tp.engines.sglang import experts
from ep2tp.engines.sglang.launch import devices
from ep2tp.engines.sglang.note import was_seen
from ep2tp.errors import LaunchError
from ep2tp.planner.topology import links_of_job
from ep2tp.settings import Mode, Settings

logger = logging.getLogger("sglang.ep2tp")


def report(runner: Any, settings: Settings) -> None:
    """Warn where a loaded model is expert parallel in a launch that ep2tp would have rewritten, and never saw.

    Args:
        runner: SGLang's ``ModelRunner``, its model loaded.
        settings: of this process.

    Raises:
        LaunchError: ``EP2TP_STRICT=1``.
    """
    arguments = runner.server_args
    if was_seen(arguments) or (found := experts.expert_parallelism(runner.model)) is None:
        return
    ranks, stages = arguments.tp_size, arguments.pp_size
    used = devices(arguments, ranks, stages)
    if settings.mode is Mode.AUTO and links_of_job(ranks * stages, used).all_nvlink:
        return
    problem = (
        f"{found}: SGLang resolved this launch before it loaded plugins, so it stayed expert parallel. A program has "
        "to call sglang.srt.plugins.load_plugins() before it makes a ServerArgs; sglang serve does so by itself"
    )
    if settings.strict:
        raise LaunchError(problem)
    if _is_first_rank():
        logger.warning("ep2tp: %s", problem)


def _is_first_rank() -> bool:
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0
