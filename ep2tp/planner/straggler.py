"""How much more the busiest rank does than the average one, where ranks hold whole experts.

Routing is taken to be uniform: every token picks ``top_k`` different experts of ``experts``, each as likely as the
others, independently of other tokens. Trained routers are less even, so these factors are lower bounds.

Two loads count, and differ:

- *experts*: different experts that a batch hits. A decode step reads the weights of every expert that is hit once,
  however many tokens hit it, so this is the load while memory bandwidth is the limit (decode at small batch);
- *tokens*: pairs of a token and an expert. This is the load once arithmetic is the limit (prefill, large batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

_SEED = 20240613
_RANDOM_NUMBERS = 10_000_000  # of one simulation: keeps it well below a second
_DRAWS = (4, 20_000)  # fewest and most simulated batches


@dataclass(frozen=True)
class Load:
    """Load of one MoE layer, in experts or in pairs of a token and an expert.

    Attributes:
        mean: expected load of a rank, over all ranks.
        busiest: expected load of the busiest rank.
    """

    mean: float
    busiest: float

    @property
    def factor(self) -> float:
        """Busiest over mean; 1.0 is perfectly even."""
        return self.busiest / self.mean


def group_sizes(experts: int, groups: int) -> tuple[int, ...]:
    """Experts of each group of ranks; the first groups hold one more where ``experts`` does not divide.

    This is vLLM's linear placement (``determine_expert_map``, vLLM 0.25.1 to 0.33.0).
    """
    base, rest = divmod(experts, groups)
    return tuple(base + (group < rest) for group in range(groups))


def expected_hits(tokens: int, experts: int, top_k: int) -> float:
    """Expected different experts that ``tokens`` tokens hit: E (1 - (1 - k/E)^T), exact for uniform routing."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def expert_load(tokens: int, experts: int, top_k: int, groups: int) -> Load:
    """Different experts hit, on the mean and on the busiest of ``groups`` groups.

    Exact for one token and for one group, else a seeded simulation.

    Example:
        >>> round(expert_load(1, 256, 8, 4).factor, 2)
        1.76
    """
    mean = expected_hits(tokens, experts, top_k) / groups
    if groups == 1:
        return Load(mean, mean)
    sizes = group_sizes(experts, groups)
    if tokens == 1:
        return Load(mean, exact_busiest_of_one_token(sizes, top_k))
    return Load(mean, _busiest(_simulate(tokens, experts, top_k) > 0, sizes))


def token_load(tokens: int, experts: int, top_k: int, groups: int) -> Load:
    """Pairs of a token and an expert, on the mean and on the busiest of ``groups`` groups (seeded simulation)."""
    mean = tokens * top_k / groups
    if groups == 1:
        return Load(mean, mean)
    return Load(mean, _busiest(_simulate(tokens, experts, top_k), group_sizes(experts, groups)))


def exact_busiest_of_one_token(sizes: Sequence[int], top_k: int) -> float:
    """Expected most experts that one token hits in one group: the maximum of a multivariate hypergeometric draw.

    P(max <= m) is the coefficient of x^k in prod_g sum_{j <= m} C(size_g, j) x^j, over C(E, k).
    """
    total = comb(sum(sizes), top_k)
    below = [0.0]
    for most in range(1, top_k + 1):
        ways = [1] + [0] * top_k
        for size in sizes:
            picks = [comb(size, j) for j in range(min(most, size) + 1)]
            ways = [sum(picks[j] * ways[n - j] for j in range(min(len(picks), n + 1))) for n in range(top_k + 1)]
        below.append(ways[top_k] / total)
    return sum(most * (below[most] - below[most - 1]) for most in range(1, top_k + 1))


@lru_cache(maxsize=64)
def _simulate(tokens: int, experts: int, top_k: int) -> NDArray[np.int32]:
    """How many tokens of a batch hit each expert, ``[draws, experts]``."""
    generator = np.random.default_rng(_SEED)
    draws = int(np.clip(_RANDOM_NUMBERS // (tokens * experts), *_DRAWS))
    counts = np.zeros((draws, experts), dtype=np.int32)
    at_once = max(1, 4_000_000 // (tokens * experts))
    for first in range(0, draws, at_once):
        part = counts[first : first + at_once]
        keys = generator.random((len(part), tokens, experts), dtype=np.float32)
        chosen = np.argpartition(keys, top_k - 1, axis=2)[:, :, :top_k].reshape(len(part), -1)
        rows = np.repeat(np.arange(len(part)), tokens * top_k)
        np.add.at(part, (rows, chosen.ravel()), 1)
    return counts


def _busiest(load: NDArray[np.int32] | NDArray[np.bool_], sizes: Sequence[int]) -> float:
    starts = np.cumsum([0, *filter(None, sizes)])[:-1]  # groups without an expert have nothing to do
    per_group = np.add.reduceat(load.astype(np.int64), starts, axis=1)
    return float(per_group.max(axis=1).mean())
