"""What ep2tp itself wrote to an engine's log (:mod:`ep2tp.rewrite.report`)."""

from __future__ import annotations

import re
from collections.abc import Collection

from ep2tp.observe.evidence import SLICED, TP, WHOLE, Reading, Strength
from ep2tp.observe.signs import Sign, message


def _rewrote(match: re.Match[str]) -> Reading:
    return Reading(f"ep2tp {match['version']} rewrote the launch to tensor parallelism ({match['why']})", TP)


def _left(match: re.Match[str]) -> Reading:
    if "does not ask for expert parallelism" in match["why"]:
        return Reading("ep2tp saw a launch that does not ask for expert parallelism", SLICED, Strength.SUPPORT)
    return Reading(f"ep2tp left a launch with expert parallelism as it is ({match['why']})", WHOLE, Strength.SUPPORT)


def _change(match: re.Match[str]) -> Reading:
    says = f"ep2tp changed {match['setting']} from {match['before']} to {match['after']}: {match['why']}"
    return Reading(says, strength=Strength.NOTE)


SIGNS = (
    Sign(
        "rewrote",
        "rewrote this launch",
        message(r"ep2tp (?P<version>\S+) rewrote this launch to tensor parallelism: (?P<why>.*)"),
        _rewrote,
    ),
    Sign("left", "left the launch's", message(r"ep2tp \S+ left the launch's parallelism as it is: (?P<why>.*)"), _left),
    Sign(
        "change",
        "--",
        # vLLM begins each line of a message with its prefix, SGLang the first alone.
        re.compile(
            r"^(?:.*\[plugin\.py:\d+\] )?(?P<setting>--[a-z]\S+) {2,}(?P<before>.+?) {2,}(?P<after>.+?) {2,}(?P<why>.+)"
        ),
        _change,
    ),
)


def conclude(found: Collection[tuple[str, Reading]]) -> None:
    """Nothing follows from missing lines."""
