"""A machine's measured collectives and memory bandwidth, as ``ep2tp plan --calibrate`` stores them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ep2tp.errors import SettingError
from ep2tp.planner.links import Link, built_in, fit_link

FORMAT = "ep2tp-profile-1"


@dataclass(frozen=True)
class Profile:
    """A stored profile.

    Attributes:
        link: fitted to its collectives.
        bandwidth: measured memory bandwidth in bytes a second, or None.
        device: what was measured, such as ``NVIDIA H100 80GB HBM3``.
    """

    link: Link
    bandwidth: float | None
    device: str


def profile_path() -> Path:
    """Where ``--calibrate`` stores this machine's profile: ``$XDG_CONFIG_HOME/ep2tp/links.json``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ep2tp" / "links.json"


def write_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Store a profile; a reader sees the old file or the whole new one.

    Raises:
        SettingError: it cannot be written there.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"format": FORMAT, **profile}, indent=1), encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise SettingError(
            f"{path}: {error.strerror}; name a file that can be written with --calibrate --output FILE"
        ) from None


def read_profile(path: Path) -> Profile:
    """Read a stored profile.

    Raises:
        SettingError: there is none, or it is not one.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; ep2tp plan --calibrate writes a profile") from None
    except ValueError as error:
        raise SettingError(f"{path}: not a JSON file: {error}") from None
    try:
        return _parse(path, stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SettingError(
            f"{path}: not a profile of ep2tp plan --calibrate ({type(error).__name__}: {error}); measure it again"
        ) from None


def find_link(name: str) -> Link:
    """The link that ``--link`` names: a built-in one, or a profile that ``--calibrate`` wrote.

    Raises:
        SettingError: it is neither.
    """
    if name in built_in():
        return built_in()[name]
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return read_profile(path).link
    raise SettingError(f"--link {name!r}: use {', '.join(built_in())}, or a JSON file that --calibrate wrote")


def _parse(path: Path, stored: Any) -> Profile:
    if stored["format"] != FORMAT:
        raise ValueError(f"format {stored['format']!r}, this ep2tp reads {FORMAT}")
    ranks, rows = int(stored["ranks"]), stored["collectives"]
    for row in rows:
        if not all(isinstance(row[key], int | float) and 0 < row[key] < math.inf for key in ("bytes", "us")):
            raise ValueError(f"bytes and us of {row} are not positive numbers")
    if ranks < 2 or not {"all_reduce", "all_gather"} <= {row["op"] for row in rows}:
        raise ValueError(f"{ranks} ranks; all_reduce and all_gather are needed")
    device = str(stored["device"])
    label = f"measured: {ranks}x {device}, {stored['backend']}, {stored['when']} ({path})"
    link = fit_link(path.stem, label, ranks, float(stored.get("step_us", 1.0)), rows)
    link = replace(link, environment=_environment(stored.get("environment", {})))
    bandwidth = stored.get("memory_bandwidth")
    return Profile(link, float(bandwidth) if bandwidth else None, device)


def _environment(stored: Mapping[str, Any]) -> dict[str, str]:
    """NCCL's variables, which go into launches that a person pastes into a shell: no other name is let through."""
    for name, value in stored.items():
        if not re.fullmatch(r"NCCL_\w+", name, re.ASCII) or not isinstance(value, str):
            raise ValueError(f"environment: {name!r} is no variable of NCCL")
    return dict(stored)
