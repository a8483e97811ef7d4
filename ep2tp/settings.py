"""The environment variables of ep2tp: all of them, parsed once, unknown values refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from ep2tp.errors import SettingError


class Mode(StrEnum):
    """When a launch that assumes expert parallelism is rewritten (``EP2TP``)."""

    AUTO = "auto"  # unless every pair of the job's GPUs is joined by NVLink
    ON = "on"
    OFF = "off"


class Kernel(StrEnum):
    """Whose fused-MoE kernel runs (``EP2TP_KERNEL``)."""

    AUTO = "auto"
    ENGINE = "engine"
    EP2TP = "ep2tp"


Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True)
class Settings:
    """One process's settings.

    Attributes:
        mode: ``EP2TP``.
        patches: ``EP2TP_PATCHES`` as given: ``all``, ``none``, or comma-separated names; ``-name`` takes one out.
        patch_path: folders of ``EP2TP_PATCH_PATH`` with the user's own patch files.
        kernel: ``EP2TP_KERNEL``.
        strict: ``EP2TP_STRICT``: stop where ep2tp would otherwise warn and leave the engine alone.
    """

    mode: Mode = Mode.AUTO
    patches: str = "all"
    patch_path: tuple[Path, ...] = ()
    kernel: Kernel = Kernel.AUTO
    strict: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings. An empty variable counts as unset, and with ``EP2TP=off`` no other one stops anything.

        Raises:
            SettingError: a variable has an unknown value, or ``EP2TP_PATCH_PATH`` names a missing folder.
        """
        given = os.environ if environment is None else environment
        env = {name: value for name, value in given.items() if name.startswith("EP2TP") and value}
        mode = _choice(Mode, "EP2TP", env.get("EP2TP", "auto"))
        patches = env.get("EP2TP_PATCHES", "all")
        folders = tuple(Path(part) for part in env.get("EP2TP_PATCH_PATH", "").split(":") if part)
        if mode is Mode.OFF:
            return cls(mode, patches, tuple(folder for folder in folders if folder.is_dir()))
        for folder in folders:
            if not folder.is_dir():
                raise SettingError(f"EP2TP_PATCH_PATH: {folder} is not a folder; name folders that hold patch files")
        strict = env.get("EP2TP_STRICT", "0")
        if strict not in ("0", "1"):
            raise SettingError(f"EP2TP_STRICT={strict!r}: use 0 or 1")
        return cls(
            mode=mode,
            patches=patches,
            patch_path=folders,
            kernel=_choice(Kernel, "EP2TP_KERNEL", env.get("EP2TP_KERNEL", "auto")),
            strict=strict == "1",
        )

    def takes_kernel(self, is_rewritten: bool) -> bool:
        """Whether ep2tp's kernel is put on a launch's layers where it fits and, with ``auto``, a table has it faster.

        With ``auto`` that is in launches that ep2tp rewrote, and in all for which ep2tp was asked by ``EP2TP=on``.
        """
        if self.kernel is Kernel.AUTO:
            return is_rewritten or self.mode is Mode.ON
        return self.kernel is Kernel.EP2TP


def _choice(kind: type[Choice], variable: str, value: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise SettingError(f"{variable}={value!r}: use one of {', '.join(kind)}") from None
