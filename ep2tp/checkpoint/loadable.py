"""Whether engines load a checkpoint at the size it is written for: heads and vocabulary are not padded."""

from __future__ import annotations

from ep2tp.checkpoint.conversion import Layout
from ep2tp.errors import ModelError
from ep2tp.model.sharding import ShardPlan
from ep2tp.rewrite.parallel_plan import Limits


def check_loadable(plan: ShardPlan, layout: Layout) -> tuple[str, ...]:
    """Warnings about a conversion that no engine loads at its tensor-parallel size.

    Files per rank load at that size only. A padded checkpoint has another use: under data-parallel attention with
    expert parallelism (DEP) neither heads nor vocabulary are sliced over all ranks.

    Raises:
        ModelError: the layout is ``ranks``, and heads or vocabulary do not divide.
    """
    facts, ranks = plan.facts, plan.ranks
    limits = Limits(facts.heads, facts.kv_heads, facts.vocabulary)
    uneven = limits.uneven(ranks)
    if not uneven:
        return ()
    fitting = ", ".join(str(size) for size in range(1, ranks + 1) if limits.allow(size))
    problem = (
        f"{uneven} do not divide over {ranks} tensor-parallel ranks, and no engine loads that. Sizes up to {ranks} "
        f"that work: {fitting}"
    )
    if layout == "ranks":
        raise ModelError(f"{facts.source}: {problem}; give one of them as --tp")
    return (f"{problem}. With data-parallel attention and expert parallelism (DEP) {ranks} ranks may load it",)
