from __future__ import annotations

from typing import Any

import pytest

from ep2tp.model.encoder import uneven_encoder_heads


@pytest.mark.parametrize(
    ("config", "ranks", "heads"),
    [
        ({"vision_config": {"num_heads": 12}}, 8, 12),  # GLM-4.5V
        ({"vision_config": {"num_heads": 12}}, 4, None),
        ({"vision_config": {"num_attention_heads": 16}}, 8, None),
        ({"vision_config": {"num_attention_heads": 34, "hidden_size": 64}}, 4, 34),
        ({"vision_config": {"hidden_size": 64}}, 8, None),
        ({"vision_config": None}, 8, None),
        ({}, 8, None),
    ],
)
def test_heads_that_do_not_divide(config: dict[str, Any], ranks: int, heads: int | None) -> None:
    assert uneven_encoder_heads(config, ranks) == heads
