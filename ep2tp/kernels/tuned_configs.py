"""Tuned tables: the user's own of ep2tp's kernel, and the files by which engines tune their Triton kernels.

Where ``ep2tp tune`` writes, and where launches look: ``$XDG_CACHE_HOME/ep2tp/configs`` (``~/.cache/ep2tp/configs``), in
a folder for each engine, whose kernel is the one that ep2tp's was compared with. A shape in the user's table hides the
same shape in the table that ships with ep2tp.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ep2tp.errors import SettingError
from ep2tp.kernels import configs
from ep2tp.kernels.configs import KernelConfig, Key, Table
from ep2tp.kernels.operands import WeightFormat


def user_folder() -> Path:
    """Where this user's tables are.

    Raises:
        SettingError: this user has no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(cache).expanduser() / "ep2tp" / "configs"
    except RuntimeError as error:
        raise SettingError(f"{cache}: {error}; set XDG_CACHE_HOME to a folder") from None


def choose(
    engine: str, device_name: str, key: Key, weight_format: WeightFormat, tokens: int, is_forced: bool = False
) -> KernelConfig | None:
    """The fastest configuration of the user's table, or of ep2tp's; None where the engine's kernel is faster.

    Args:
        engine: ``vllm`` or ``sglang``.
        device_name: as PyTorch has it.
        key: the experts' shape.
        weight_format: of their weights.
        tokens: of a call.
        is_forced: ep2tp's own table counts though it was compared with another engine's kernel.

    Raises:
        SettingError: the user's table cannot be read.
    """
    path = user_folder() / engine / configs.file_name(device_name, str(weight_format))
    lines = _read_cached(path).get(key)
    if lines is None:
        uses_shipped = is_forced or engine == configs.COMPARED_WITH
        return configs.choose(device_name, key, weight_format, tokens) if uses_shipped else None
    return next((config for most, config in lines if tokens <= most), None)


def read_table(path: Path) -> Table:
    """A table of ep2tp's format; empty where there is no such file.

    Raises:
        SettingError: the file is damaged, or may not be read.
    """
    try:
        return configs.read_table(path)
    except OSError as error:
        raise SettingError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingError(
            f"{path}: not a table of kernel configurations ({error}); delete it and tune again"
        ) from None


_read_cached = lru_cache(read_table)


def write_table(path: Path, table: Table) -> None:
    """Add shapes to a table, in place of the same shapes; others see the old file or the whole new one.

    Two that write at the same time wait for each other, so that no shape is lost.

    Raises:
        SettingError: there is a damaged table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        merged = {**read_table(path), **table}
        shapes = [
            {
                **dict(zip(("E", "K", "I", "top_k"), key, strict=True)),
                "configs": [{"max_tokens": most, "config": configs.to_json(config)} for most, config in lines],
            }
            for key, lines in sorted(merged.items())
        ]
        write_json(path, {"shapes": shapes})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process that asks for the same is in here."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside the target and put it in its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
