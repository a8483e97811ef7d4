from __future__ import annotations

from pathlib import Path

import pytest

from ep2tp.errors import SettingError
from ep2tp.settings import Kernel, Mode, Settings


def test_defaults() -> None:
    assert Settings.from_environment({}) == Settings(Mode.AUTO, "all", (), Kernel.AUTO, False)


def test_empty_variables_are_unset() -> None:
    """As a compose file passes on what is not set: ``EP2TP: ${EP2TP:-}``."""
    names = ("EP2TP", "EP2TP_PATCHES", "EP2TP_PATCH_PATH", "EP2TP_KERNEL", "EP2TP_STRICT")
    assert Settings.from_environment(dict.fromkeys(names, "")) == Settings()


def test_off_is_off_whatever_the_others_say(tmp_path: Path) -> None:
    wrong = {"EP2TP_KERNEL": "triton", "EP2TP_STRICT": "x", "EP2TP_PATCH_PATH": f"/nowhere/at/all:{tmp_path}"}
    assert Settings.from_environment({"EP2TP": "off", **wrong}) == Settings(Mode.OFF, patch_path=(tmp_path,))


def test_every_variable_is_read(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "EP2TP": "on",
            "EP2TP_PATCHES": "-kimi_k2",
            "EP2TP_PATCH_PATH": f"{tmp_path}:{tmp_path}",
            "EP2TP_KERNEL": "engine",
            "EP2TP_STRICT": "1",
        }
    )
    assert settings == Settings(Mode.ON, "-kimi_k2", (tmp_path, tmp_path), Kernel.ENGINE, True)


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("EP2TP", "yes", "auto, on, off"),
        ("EP2TP_KERNEL", "triton", "auto, engine, ep2tp"),
        ("EP2TP_STRICT", "true", "0 or 1"),
        ("EP2TP_PATCH_PATH", "/nowhere/at/all", "not a folder"),
    ],
)
def test_unknown_values_are_refused_with_the_allowed_ones(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingError, match=variable) as caught:
        Settings.from_environment({variable: value})
    assert allowed in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "kernel", "plain_launch", "rewritten_launch"),
    [
        ("auto", "auto", False, True),
        ("on", "auto", True, True),
        ("off", "auto", False, False),
        ("auto", "ep2tp", True, True),
        ("on", "engine", False, False),
    ],
)
def test_which_launches_take_the_kernel(mode: str, kernel: str, plain_launch: bool, rewritten_launch: bool) -> None:
    settings = Settings.from_environment({"EP2TP": mode, "EP2TP_KERNEL": kernel})
    assert settings.takes_kernel(is_rewritten=False) is plain_launch
    if mode != "off":  # which rewrites nothing
        assert settings.takes_kernel(is_rewritten=True) is rewritten_launch
