"""What a plan's collectives move: kinds, counts, and bytes that each rank sends. Pure arithmetic.

Bytes are those that one rank sends, on whatever link it has, for ring algorithms over ``n`` ranks:

=================  ===========================  ==============================================================
collective         bytes sent by a rank         source
=================  ===========================  ==============================================================
all_reduce         2 (n-1)/n x payload          Patarasuk & Yuan 2009; NVIDIA nccl-tests, doc/PERFORMANCE.md
all_gather         (n-1)/n x gathered payload   the same
reduce_scatter     (n-1)/n x payload            the same
all_to_all         rank-deduplicated dispatch   a token is sent once to every other rank that holds an expert it
                   and combine                  uses (DeepEP); see :func:`expected_remote_ranks`
=================  ===========================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb
from typing import Literal

from ep2tp.planner.straggler import group_sizes

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
ACTIVATION_BYTES = 2
"""BF16, the dtype of hidden states in every engine here."""


@dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
        kind: which one.
        ranks: how many take part.
        sent: bytes that a rank sends.
        what: what it carries, for a person.
    """

    kind: Kind
    ranks: int
    sent: float
    what: str


def all_reduce(payload: float, ranks: int, what: str) -> Collective:
    """Ring all_reduce of ``payload`` bytes: a reduce_scatter, then an all_gather."""
    return Collective("all_reduce", ranks, 2 * (ranks - 1) / ranks * payload, what)


def all_gather(gathered: float, ranks: int, what: str) -> Collective:
    """Ring all_gather into ``gathered`` bytes: each rank passes on all but the part that its neighbour sent first."""
    return Collective("all_gather", ranks, (ranks - 1) / ranks * gathered, what)


def reduce_scatter(payload: float, ranks: int, what: str) -> Collective:
    """Ring reduce_scatter of ``payload`` bytes."""
    return Collective("reduce_scatter", ranks, (ranks - 1) / ranks * payload, what)


def expected_distinct_ranks(sizes: Sequence[int], top_k: int) -> float:
    """Expected number of ranks that hold at least one of a token's ``top_k`` experts; exact for uniform routing.

    A rank with ``s`` of ``E`` experts is missed with probability C(E-s, k) / C(E, k) (hypergeometric).
    """
    total = sum(sizes)
    return sum(1 - comb(total - size, top_k) / comb(total, top_k) for size in sizes)


def expected_remote_ranks(experts: int, top_k: int, ranks: int) -> float:
    """Expected ranks other than its own to which a token is sent, averaged over the ranks that tokens start on."""
    return expected_distinct_ranks(group_sizes(experts, ranks), top_k) * (ranks - 1) / ranks


def padded_tokens(tokens: int, ranks: int) -> int:
    """Tokens that data-parallel ranks hand over: every rank is padded to the busiest rank's (vLLM, CUDA graphs)."""
    return ranks * ceil(tokens / ranks)


def gather_scatter(tokens: int, hidden: int, ranks: int) -> list[Collective]:
    """Dispatch and combine as all_gather and reduce_scatter: vLLM's default ``allgather_reducescatter``, and SGLang's
    data-parallel attention with ``--moe-a2a-backend none``. Both directions carry BF16 hidden states.

    Not counted: top-k ids and weights (8 bytes an expert, 0.4% of a BF16 hidden state of 7168 for top 8). Where a
    kernel takes quantised activations, vLLM's dispatch gathers FP8 and scales instead, half as much.
    """
    payload = padded_tokens(tokens, ranks) * hidden * ACTIVATION_BYTES
    return [
        all_gather(payload, ranks, "dispatch: hidden states, BF16"),
        reduce_scatter(payload, ranks, "combine: expert outputs, BF16"),
    ]


def deduplicated_all_to_all(
    tokens: int, hidden: int, ranks: int, experts: int, top_k: int, dispatch_bytes: float = ACTIVATION_BYTES
) -> list[Collective]:
    """Dispatch and combine as DeepEP does them: a token once to each rank that needs it, and its partial sum back.

    Args:
        tokens: of the whole batch, spread evenly over the ranks.
        hidden: hidden size.
        ranks: expert-parallel ranks.
        experts, top_k: of a layer.
        dispatch_bytes: bytes of a value on the way out: 2 for BF16; 1 + 4/128 for FP8 with a scale each 128 (DeepEP's
            low-latency kernels). The way back is BF16 in either case.
    """
    copies = ceil(tokens / ranks) * expected_remote_ranks(experts, top_k, ranks)
    return [
        Collective("all_to_all", ranks, copies * hidden * dispatch_bytes, "dispatch: one copy a remote rank"),
        Collective("all_to_all", ranks, copies * hidden * ACTIVATION_BYTES, "combine: partial sums, BF16"),
    ]


def moe_layer(tokens: int, hidden: int, ranks: int, data_parallel: int) -> list[Collective]:
    """The collectives of one MoE layer: dispatch and combine where attention is data parallel, else one all_reduce."""
    if ranks == 1:
        return []
    if data_parallel > 1:
        return gather_scatter(tokens, hidden, ranks)
    return [all_reduce(tokens * hidden * ACTIVATION_BYTES, ranks, "sum of the experts' outputs, BF16")]


def sent_bytes(collectives: Sequence[Collective]) -> float:
    """Bytes that one rank sends in all of them."""
    return sum(collective.sent for collective in collectives)
