"""Fields of a config.json that the planner computes with, checked before it does: a config is not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ep2tp.errors import ModelError
from ep2tp.model.families import config_parts

_SIZES = (  # whole numbers; null and 0 stand for none
    "index_head_dim",
    "index_n_heads",
    "index_topk",
    "kv_lora_rank",
    "max_position_embeddings",
    "o_groups",
    "o_lora_rank",
    "q_lora_rank",
    "sliding_window",
    "sliding_window_size",
)
_COUNTS = (  # whole numbers from 1 up, or null
    "head_dim",
    "num_key_value_heads",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "swa_num_key_value_heads",
    "v_head_dim",
)
_LARGEST = 1 << 30


def check_fields(config: Mapping[str, Any], model: str) -> None:
    """Check what a family is found by, and what attention and KV cache are computed from.

    Raises:
        ModelError: a field has a value that no engine takes; the message names field, value and what is expected.
    """
    for part in config_parts(config):
        names = part.get("architectures")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise _error(model, "architectures", names, "a list of names")
        for least, fields in ((0, _SIZES), (1, _COUNTS)):
            for field in fields:
                value = part.get(field)
                if value is not None and not _is_number(value, least):
                    raise _error(model, field, value, f"a whole number from {least} to {_LARGEST}")


def _is_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _error(model: str, field: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{model}: config.json has {field}={value!r:.100}; expected {expected}. Correct the file")
