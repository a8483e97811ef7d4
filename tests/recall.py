"""A checkpoint whose routed experts know which token follows which, so that its greedy tokens have wide margins.

Random weights make poor witnesses of equal tokens: their logits nearly tie, so that rounding alone turns one token
into another. Here every expert holds a table. Neuron ``slot[t]`` looks for token ``t`` (gate and up rows along its
embedding) and writes the output direction of ``answer[t]`` (down column); on random vectors it hardly answers any other
token. All else is random and weak. Any tensor-parallel size must then give the same tokens. Experts loaded with wrong
scales give others, because neighbouring blocks of neurons are stored at scales a factor of 64 apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ep2tp.demo.tiny import TinyModel

_WEAK = 0.05  # of attention, dense layer and shared experts; as TinyModel draws them, they would drown the table
_SPREAD, _BLOCK = 64.0, 128


class Recall:
    """Mixed into :class:`TinyModel`: experts answer each token with :meth:`answer`. Needs vocabulary <= expert_size."""

    expert_size: int
    hidden: int
    seed: int
    vocabulary: int

    def answer(self) -> torch.Tensor:
        """For each token the one that follows it: a permutation, I64 [vocabulary]."""
        return torch.randperm(self.vocabulary, generator=torch.Generator().manual_seed(self.seed + 1))

    def _tensors(self, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = dict(super()._tensors(generator))  # type: ignore[misc]
        table = self._table(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"], generator)
        for name, tensor in tensors.items():
            if ".experts." in name:
                yield name, table[name.split(".")[-2]]
            elif name.endswith(("down_proj.weight", "o_proj.weight")):
                yield name, tensor * _WEAK
            else:
                yield name, tensor

    def _table(
        self, embedding: torch.Tensor, head: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """The three matrices of an expert. A token of length sqrt(hidden) makes its neuron give 8 * 8."""
        slot = torch.randperm(self.expert_size, generator=generator)[: self.vocabulary]
        scale = _SPREAD ** (torch.arange(self.expert_size) // _BLOCK % 2).float()
        keys = torch.zeros(self.expert_size, self.hidden)
        keys[slot] = torch.nn.functional.normalize(embedding) * 8 / self.hidden**0.5
        values = torch.zeros(self.expert_size, self.hidden)
        values[slot] = torch.nn.functional.normalize(head[self.answer()]) * self.hidden**0.5 / 64
        return {
            "gate_proj": keys,
            "up_proj": keys * scale[:, None],
            "down_proj": (values / scale[:, None]).T.contiguous(),
        }


@dataclass(frozen=True)
class RecallModel(Recall, TinyModel):
    """A tiny one."""

    expert_size: int = 325
    vocabulary: int = 320
