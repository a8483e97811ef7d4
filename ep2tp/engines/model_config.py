"""The model's config.json as an engine will see it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_model_config(
    source: str, revision: str | None = None, token: Any = None, overrides: Any = None
) -> dict[str, Any] | None:
    """Read config.json of a folder or a hub model, before the engine has made a config object.

    Args:
        source: folder or hub id.
        revision, token: of the hub.
        overrides: the user's values, merged into the config where they are a mapping.

    Returns:
        The parsed config, or None where it cannot be read (no such file, a store that is not a hub, no network).
    """
    if Path(source).is_file() and Path(source).name != "config.json":
        return None  # weights, such as a GGUF file, all of which transformers would read as text
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(source, revision=revision, token=token)
    except (OSError, ValueError):
        return None
    return merged(config, overrides) if isinstance(overrides, Mapping) else dict(config)


def read_quantization_file(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """``hf_quant_config.json``, in which ModelOpt keeps what others say in config.json; None where there is none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            source, "hf_quant_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return None if path is None else {"quant_method": "modelopt", **json.loads(Path(path).read_bytes())}
    except (OSError, ValueError):
        return None


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``overrides`` in place of its values, mappings within it merged likewise."""
    result = dict(config)
    for key, value in overrides.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
