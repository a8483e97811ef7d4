"""The model's config.json as vLLM will see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_model_config(arguments: Any) -> dict[str, Any] | None:
    """Read config.json with the user's ``hf_overrides`` (a mapping), before vLLM has made a config object.

    Args:
        arguments: an ``EngineArgs``, or the Namespace of ``vllm serve``.

    Returns:
        The parsed config, or None where it cannot be read (no such file, a store that is not a hub, no network).
    """
    from transformers import PretrainedConfig

    source = getattr(arguments, "hf_config_path", None) or arguments.model
    token = getattr(arguments, "hf_token", None)
    try:
        config, _ = PretrainedConfig.get_config_dict(source, revision=arguments.revision, token=token)
    except (OSError, ValueError):
        return None
    overrides = getattr(arguments, "hf_overrides", None)
    return _merged(config, overrides) if isinstance(overrides, Mapping) else dict(config)


def resolved_config(arguments: Any, hf_config: Any) -> dict[str, Any]:
    """The config of a model whose ``hf_config`` vLLM has made: config.json where it says all, else that object."""
    config = read_model_config(arguments)
    if config is None or callable(getattr(arguments, "hf_overrides", None)):
        config = dict(hf_config.to_dict())
    if "quantization_config" not in config and (quant := getattr(hf_config, "quantization_config", None)):
        config["quantization_config"] = quant  # vLLM reads it from hf_quant_config.json
    return config


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
