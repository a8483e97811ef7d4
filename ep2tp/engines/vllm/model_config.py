"""The model's config.json as vLLM will see it."""

from __future__ import annotations

from typing import Any

from ep2tp.engines import model_config


def read_model_config(arguments: Any) -> dict[str, Any] | None:
    """Read config.json with the user's ``hf_overrides`` (a mapping), before vLLM has made a config object.

    For a draft in the format of speculators, vLLM serves the model that the draft was made for: that one's is read.

    Args:
        arguments: an ``EngineArgs``, or the Namespace of ``vllm serve``.

    Returns:
        The parsed config, or None where it cannot be read (no such file, a store that is not a hub, no network).
    """
    source = getattr(arguments, "hf_config_path", None) or arguments.model
    token, overrides = getattr(arguments, "hf_token", None), getattr(arguments, "hf_overrides", None)
    config = model_config.read_model_config(source, arguments.revision, token, overrides)
    if config is not None and (verifier := _verifier(config)):
        return model_config.read_model_config(verifier, arguments.revision, token, overrides)
    return config


def _verifier(config: dict[str, Any]) -> str | None:
    """The model that a draft in the format of speculators was made for; None for every other model."""
    speculators = config.get("speculators_config")
    verifier = speculators.get("verifier") if isinstance(speculators, dict) else None
    return str(verifier["name_or_path"]) if isinstance(verifier, dict) and verifier.get("name_or_path") else None


def resolved_config(arguments: Any, hf_config: Any) -> dict[str, Any]:
    """The config of a model whose ``hf_config`` vLLM has made: config.json where it says all, else that object."""
    config = read_model_config(arguments)
    if config is None or callable(getattr(arguments, "hf_overrides", None)):
        config = dict(hf_config.to_dict())
    if "quantization_config" not in config and (quant := getattr(hf_config, "quantization_config", None)):
        config["quantization_config"] = quant  # vLLM reads it from hf_quant_config.json
    return config
