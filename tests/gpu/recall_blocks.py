"""The table checkpoint of ``tests/recall.py`` in FP8 blocks of 128x128, and how many tokens of a run are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp8_checkpoint import BlockModel

from tests.recall import Recall


@dataclass(frozen=True)
class RecallBlockModel(Recall, BlockModel):
    """The table in FP8 blocks; another seed gives another table."""

    vocabulary: int = 1024


def right_tokens(run: Any, model: RecallBlockModel, prompts: list[list[int]]) -> float:
    """The share of a run's tokens that are the model's answer to the token before them."""
    answer = model.answer().tolist()
    pairs = [
        (answer[before], token)
        for prompt, tokens in zip(prompts, run.facts["tokens"], strict=True)
        for before, token in zip([prompt[-1], *tokens], tokens, strict=False)
    ]
    return sum(expected == token for expected, token in pairs) / len(pairs)
