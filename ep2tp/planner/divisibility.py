"""What of a model divides under a plan, and what stock engines do where it does not.

Outcomes are read from engine source (vLLM 0.25.1, 0.32.0, 0.33.0; SGLang 0.5.17 to 0.5.23); error texts are quoted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ep2tp.model.exact import FINEST_REFINED, refined_block
from ep2tp.model.facts import ModelFacts, TensorClass
from ep2tp.model.families import ClassName
from ep2tp.planner.layouts import Layout
from ep2tp.rewrite.parallel_plan import Limits

ENGINES = ("vLLM", "SGLang")
Outcome = Literal["runs", "refuses", "wrong in silence"]
_FP8 = "model_executor/layers/quantization/fp8.py"
_UTILS = "model_executor/layers/quantization/utils/fp8_utils.py"
_LINEAR = "distributed/utils.py: ensure_divisibility"
_ROUTED_EXPERTS = "model_executor/layers/fused_moe/routed_experts.py"


@dataclass(frozen=True)
class Behaviour:
    """What a stock engine does with a size that does not divide."""

    engine: str
    versions: str
    what: str
    outcome: Outcome
    text: str
    source: str


def blockers(facts: ModelFacts, layout: Layout) -> list[str]:
    """What keeps a plan from running at all, with or without ep2tp; empty where nothing does."""
    found = []
    limits = Limits(facts.heads, facts.kv_heads, facts.vocabulary)
    ranks = layout.attention_ranks
    if uneven := limits.uneven(ranks):
        found.append(f"{uneven} do not divide over {ranks} ranks")
    if layout.pp > facts.layers:
        found.append(f"{facts.layers} layers for {layout.pp} pipeline stages")
    if layout.ep > facts.experts:
        found.append(f"{facts.experts} experts for {layout.ep} groups")
    return found


def kv_copies(facts: ModelFacts, layout: Layout) -> int:
    """How many ranks hold the same KV head; for a latent KV cache (MLA), all of them."""
    ranks = layout.attention_ranks
    return ranks if facts.kv_heads is None else max(1, ranks // facts.kv_heads)


def stock_behaviour(facts: ModelFacts, layout: Layout) -> list[Behaviour]:
    """What vLLM and SGLang do, without ep2tp, with experts and every class of weights that do not divide."""
    found: list[Behaviour] = []
    if facts.experts % layout.ep:
        what = f"experts ({facts.experts} over {layout.ep})"
        text = "the first ranks hold one expert more"
        found.append(Behaviour("vLLM", "0.25.1, 0.32.0, 0.33.0", what, "runs", text, "fused_moe/expert_map_manager.py"))
        text = "AssertionError (num_experts % ep_size)"
        found.append(Behaviour("SGLang", "0.5.23", what, "refuses", text, "layers/moe/fused_moe_triton/layer.py"))
    for c in facts.classes:
        for engine in ENGINES:
            ranks = _ranks(engine, c.name, layout)
            if c.is_known and c.size % (ranks * c.block) and (ranks > 1 or "fp8_block" in c.format_names):
                found += [b for b in _behaviour(facts, c, ranks) if b.engine == engine]
    return found


def _ranks(engine: str, name: ClassName, layout: Layout) -> int:
    """Ranks over which an engine slices a class of weights.

    Under data-parallel attention vLLM holds shared experts and dense MLPs whole on each rank; SGLang slices them over
    the ranks of all experts, unless it has an all-to-all backend or ``--moe-dense-tp-size 1`` (0.5.17 and 0.5.23,
    models/deepseek_v2.py: ``is_dense_ffn_fully_dp``, ``_shared_expert_use_tp1``).
    """
    if name == "routed":
        return layout.slices
    return layout.stage_ranks if engine == "SGLang" else layout.attention_ranks


def slices_below_block(facts: ModelFacts, layout: Layout) -> list[TensorClass]:
    """Classes of which an even slice is smaller than one block, so that some ranks hold nothing but padding."""
    return [
        c
        for c in facts.classes
        if c.is_known and c.size < (layout.slices if c.name == "routed" else layout.attention_ranks) * c.block
    ]


def _behaviour(facts: ModelFacts, c: TensorClass, ranks: int) -> Iterator[Behaviour]:
    what = f"{c.name} ({c.size} over {ranks})"
    own = facts.family.exact_in.get("vllm", {}).get(c.name)
    if own and c.size % ranks == 0:
        yield Behaviour("vLLM", "0.25.1, 0.32.0, 0.33.0", what, "runs", own, "models/gpt_oss.py")
        text = "slices whole blocks; FlashInfer's CUTLASS kernels (SM120's default) have no room, and loading stops"
        yield Behaviour("SGLang", "0.5.23", what, "runs", text, "mxfp4.py")
        return
    if c.size % ranks:
        is_routed = c.name == "routed"
        text = "AssertionError (intermediate_size % tp_size)" if is_routed else f"{c.size} is not divisible by {ranks}"
        yield Behaviour("vLLM", "all", what, "refuses", text, "fused_moe/config.py" if is_routed else _LINEAR)
        yield Behaviour("SGLang", "all", what, "refuses", text, "fused_moe_triton/layer.py" if is_routed else _LINEAR)
        return
    name = c.format_names
    if "fp8_block" in name and not _only_routed_is_packed(c):
        yield from _fp8_block(facts, c, ranks, what)
    elif "nvfp4" in name:
        yield from _nvfp4(what)
    elif "mxfp4" in name:
        yield from _mxfp4(facts, what)
    elif name.startswith(("awq", "gptq")):
        yield _awq_or_gptq(c, ranks, what)
    elif "int" in name:
        yield from _grouped_integers(what)
    else:
        yield Behaviour("vLLM", "0.33.0", what, "refuses", f"ValueError: a slice would cut a block of {c.block}", name)


def _only_routed_is_packed(c: TensorClass) -> bool:
    return c.name == "routed" and "mxfp4" in c.format_names


def _fp8_block(facts: ModelFacts, c: TensorClass, ranks: int, what: str) -> Iterator[Behaviour]:
    slice_, block = c.size // ranks, c.block
    if c.name != "routed" and ranks == 1:  # measured in vLLM 0.25.1: GLM-4.5-Air's dense layer, docs/results
        text = "assert x.shape[-1] % group_size == 0"
        yield Behaviour("vLLM", "0.25.1, 0.32.0, 0.33.0", what, "refuses", text, _UTILS)
        text = f"Weight output_partition_size = {slice_} is not divisible by weight quantization block_n = {block}."
        yield Behaviour("SGLang", "0.5.23", what, "refuses", text, "layers/quantization/fp8_utils.py")
        return
    if c.name != "routed":
        text = f"Weight input_size_per_partition = {slice_} is not divisible by weight quantization block_k = {block}."
        yield Behaviour("vLLM", "0.25.1, 0.32.0, 0.33.0", what, "refuses", text, _UTILS)
        yield Behaviour("SGLang", "0.5.23", what, "refuses", text, "layers/quantization/fp8_utils.py")
        return
    text = (
        f"The output_size of gate's and up's weight = {slice_} is not divisible by weight quantization "
        f"block_n = {block}."
    )
    yield Behaviour("vLLM", "0.25.1", what, "refuses", text, _FP8)
    if refined := refined_block(facts, ranks):
        how = f"repeats the scales on a {refined}x{refined} grid (exact; Triton kernels only)"
        yield Behaviour("vLLM", "0.32.0, 0.33.0", what, "runs", how, "fused_moe/oracle/fp8.py")
    else:
        yield Behaviour("vLLM", "0.32.0, 0.33.0", what, "refuses", text, "fused_moe/oracle/fp8.py")
    yield Behaviour("SGLang", "0.5.23", what, "refuses", text, "layers/quantization/fp8.py")


def _nvfp4(what: str) -> Iterator[Behaviour]:
    text = "no check: a group of 16 straddles two ranks, and the wrong scale is used"
    yield Behaviour("vLLM", "0.25.1, 0.32.0, 0.33.0", what, "wrong in silence", text, _ROUTED_EXPERTS)
    yield Behaviour("SGLang", "0.5.23", what, "wrong in silence", text, "layers/quantization/modelopt_quant.py")


def _mxfp4(facts: ModelFacts, what: str) -> Iterator[Behaviour]:
    text = "scale tensors are sliced by floor division: down_proj gets scales of other columns"
    yield Behaviour("vLLM", "0.25.1, 0.33.0", what, "wrong in silence", text, _ROUTED_EXPERTS)
    if "fp8" not in facts.quantization.method:
        yield Behaviour("SGLang", "0.5.23", what, "wrong in silence", text, "fused_moe_triton/layer.py")
        return
    text = "moe_intermediate_size / moe_tp_size must be a multiple of weight_block_size_n"
    yield Behaviour("SGLang", "0.5.23", what, "refuses", text, "moe_ep_setup.py")


def _awq_or_gptq(c: TensorClass, ranks: int, what: str) -> Behaviour:
    """vLLM's MoeWNA16 halves the group until slices are whole groups, down to 32."""
    group = c.block
    while (c.size // ranks) % group and group > FINEST_REFINED:
        group //= 2
    source = "model_executor/layers/quantization/moe_wna16.py"
    if (c.size // ranks) % group == 0:
        text = f"repeats the scales for groups of {group} (exact)"
        return Behaviour("vLLM", "0.25.1, 0.32.0, 0.33.0", what, "runs", text, source)
    return Behaviour("vLLM", "0.25.1, 0.32.0, 0.33.0", what, "refuses", "AssertionError (group size)", source)


def _grouped_integers(what: str) -> Iterator[Behaviour]:
    text = (
        "Scale groups would otherwise cross TP shard boundaries; use a compatible TP size or enable expert parallelism."
    )
    yield Behaviour("vLLM", "0.25.1, 0.33.0", what, "refuses", text, "compressed_tensors_moe_wna16.py")
    text = "no check: the number of groups is rounded down, and scales shift"
    yield Behaviour("SGLang", "0.5.23", what, "wrong in silence", text, "compressed_tensors_wNa16_moe.py")
