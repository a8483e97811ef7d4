"""How the weights of a plan are sliced in each engine: padded by ep2tp, or exactly by vLLM itself.

What vLLM 0.32 and 0.33 do is meant wherever vLLM is named here. Older versions refine no scales, so that ep2tp pads for
them what it pads for SGLang.
"""

from __future__ import annotations

from ep2tp.model.exact import exact_in_engine, refined_block
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import ClassName
from ep2tp.model.sharding import ShardPlan, plan_shards
from ep2tp.planner.layouts import Layout

OLDER_VLLM = "vLLM before 0.32"


def exact_in_vllm(facts: ModelFacts, layout: Layout) -> dict[ClassName, str]:
    """Classes that ep2tp leaves to vLLM (:func:`ep2tp.engines.vllm.experts.left_to_engine`), and how it slices them.

    Empty for plans with whole experts, which ep2tp does not pad.
    """
    if layout.holds_whole_experts or layout.slices == 1:
        return {}
    found = exact_in_engine(facts, layout.slices, "vllm")
    if block := refined_block(facts, layout.slices):
        found["routed"] = f"scales repeated on a {block}x{block} grid"
    return found


def plan_in_vllm(facts: ModelFacts, layout: Layout, padded: ShardPlan) -> ShardPlan | None:
    """ep2tp's plan in vLLM, or None where it is ``padded``, the one in SGLang."""
    exact = exact_in_vllm(facts, layout)
    if not exact or not padded.is_padded:
        return None
    found = plan_shards(facts, layout.slices, exact, dense_ranks=layout.attention_ranks)
    return None if found.fields == padded.fields else found


def has_other_sizes(plan: ShardPlan) -> bool:
    """Whether a rank in vLLM holds less than a padded one.

    Not where vLLM slices in whole blocks (gpt-oss): its fullest rank holds as many as a padded one.
    """
    return not set(plan.left_to_engine) & set(plan.facts.family.exact_in.get("vllm", {}))


def engines_padded(layout: Layout, padded: ShardPlan | None, in_vllm: ShardPlan | None) -> tuple[str, ...]:
    """The engines in which ep2tp grows the fields of ``padded``."""
    if padded is None or not padded.is_padded or layout.holds_whole_experts:
        return ()
    if in_vllm is None:
        return ("vLLM", "SGLang")
    return ("SGLang", OLDER_VLLM) if has_other_sizes(in_vllm) else ("SGLang",)
