"""What SGLang's log says about the plan: strings of 0.5.17 to 0.5.23."""

from __future__ import annotations

import re
from collections.abc import Collection

from ep2tp.observe.evidence import DEP, DISPATCHED, SLICED, TEP, Reading, Strength
from ep2tp.observe.layouts import sglang_layout, sglang_scheduler
from ep2tp.observe.signs import Sign, always, message, tags


def server_args_reading(value: dict[str, object]) -> Reading | None:
    """The plan of resolved server arguments (from the log, or ``/server_info``); None without their sizes."""
    names = ("tp_size", "ep_size", "attn_dp_size", "dp_size", "moe_dp_size", "dwdp_size")
    words = [str(value.get(name) or 1) for name in names]
    if value.get("tp_size") is None or not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        return None
    tp, ep, attention_dp, dp, moe_dp, dwdp = map(int, words)
    if str(value.get("enable_dp_attention")) == "True":
        attention_dp = max(attention_dp, dp)
    return sglang_layout(tp, ep, str(value.get("moe_a2a_backend") or "none"), attention_dp, moe_dp, dwdp)


_KEYS = (
    "tp_size",
    "ep_size",
    "moe_a2a_backend",
    "attn_dp_size",
    "enable_dp_attention",
    "dp_size",
    "moe_dp_size",
    "dwdp_size",
)
# A dict's repr since 0.5.20, a dataclass's before.
_ARGUMENT = re.compile(r"(?<![\w])'?(" + "|".join(_KEYS) + r")'?(?:=|: )(?:<[^:>]*: )?'?([\w.-]+)")


def _server_args(match: re.Match[str]) -> Reading | None:
    found = _ARGUMENT.findall(match["arguments"])
    return server_args_reading({key: None if value == "None" else value for key, value in reversed(found)})


def _warmup(match: re.Match[str]) -> Reading:
    if int(match["ep"]) > 1:
        return Reading(f"ep_size is {match['ep']}", TEP | DISPATCHED)
    return Reading("ep_size is 1: experts are not spread over ranks", SLICED)


def _adjusted(match: re.Match[str]) -> Reading:
    says = f"SGLang set ep_size to tp_size by itself, for the all-to-all backend {match['name']}"
    return Reading(says, DEP, Strength.SUPPORT)  # while it resolved its arguments; the outcome is in server_args


SIGNS = (
    Sign(
        "server_args",
        "server_args=",
        message(r"server_args=(?P<arguments>(?:ServerArgs\(|\{).*)"),
        _server_args,
        is_last_valid=True,
        origin=("entrypoints/engine.py", "server_args="),
    ),
    Sign(
        "scheduler",
        " TP",
        re.compile(r"^.{0,80}?\[\d{4}-\d\d-\d\d [\d:.]+(?P<tags>(?: [A-Z_]+\d+)+)\] "),
        lambda match: sglang_scheduler(tags(match["tags"])),
        origin=("managers/scheduler.py", 'prefix += f" EP{shown_moe_ep}"'),
    ),
    Sign(
        "adjusted",
        "The expert parallel size",
        message(r"(?P<name>\S.{0,40}?) (?:MoE|MegaMOE) is enabled\. The expert parallel size"),
        _adjusted,
        origin=("arg_groups/overrides.py", "MoE is enabled. The expert parallel size "),
    ),
    Sign(
        "dwdp",
        "DWDP enabled: ",
        message(r"DWDP enabled: dwdp_size="),
        always(Reading("DWDP: whole experts under data-parallel attention", DEP, Strength.SUPPORT)),
        origin=("", 'f"DWDP enabled: dwdp_size='),
    ),
    Sign(
        "warmup",
        "warmup completed",
        message(r"NCCL/RCCL/HCCL warmup completed in .*ep_size=(?P<ep>\d+)\)"),
        _warmup,
        origin=("distributed/bootstrap.py", 'f"NCCL/RCCL/HCCL warmup completed in {warmup_elapsed:.3f}s "'),
    ),
)


def conclude(found: Collection[tuple[str, Reading]]) -> None:
    """Nothing follows from missing lines: the arguments tell all."""
