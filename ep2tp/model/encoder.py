"""The image encoder beside a language model, which a tensor-parallel launch slices by heads, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEADS = ("num_heads", "num_attention_heads")


def uneven_encoder_heads(config: Mapping[str, Any], ranks: int) -> int | None:
    """The heads of a model's image encoder where they do not divide over ``ranks``; else None.

    Args:
        config: the model's config.json (GLM-4.5V's encoder has 12 heads beside the 96 of its language model).
        ranks: tensor-parallel ranks.
    """
    encoder = config.get("vision_config")
    if not isinstance(encoder, Mapping):
        return None
    heads = next((encoder[name] for name in _HEADS if isinstance(encoder.get(name), int)), 0)
    return heads if heads % ranks else None
