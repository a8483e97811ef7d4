"""What vLLM itself does with experts: which odd shapes it slices exactly, and whether a loaded model is really TP."""

from __future__ import annotations

import importlib
from math import gcd
from typing import Any

from ep2tp.errors import SeamError
from ep2tp.layout.split import refine
from ep2tp.model.exact import exact_in_engine
from ep2tp.model.facts import ModelFacts, TensorClass
from ep2tp.model.families import ClassName

_FP8_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.fp8"
_FINEST_BLOCK = 32  # the finest block that vLLM's refinement accepts


def left_to_engine(facts: ModelFacts, ranks: int, moe_backend: str) -> dict[ClassName, str]:
    """Classes that do not divide into whole blocks but that the installed vLLM slices exactly, and how it does.

    Args:
        facts: the model.
        ranks: tensor-parallel size of the experts.
        moe_backend: vLLM's ``moe_backend``; only ``auto`` and ``triton`` refine block scales.
    """
    if ranks == 1:
        return {}
    handled = exact_in_engine(facts, ranks, "vllm")
    routed = facts.tensor_class("routed")
    is_uneven = routed is not None and routed.size % (ranks * routed.block) != 0
    if routed and is_uneven and moe_backend in ("auto", "triton") and (block := _refined_block(facts, routed, ranks)):
        handled["routed"] = f"vLLM repeats the scales on a {block}x{block} grid (exact, Triton kernels)"
    return handled


def _refined_block(facts: ModelFacts, routed: TensorClass, ranks: int) -> int | None:
    """The block to which ``Fp8MoEMethod`` of the installed vLLM (0.32 and later) refines this shape, or None."""
    if facts.quantization.method != "fp8" or routed.format_names != f"fp8_block{routed.block}":
        return None
    if not hasattr(importlib.import_module(_FP8_ORACLE), "refine_fp8_moe_block_shape"):
        return None
    block = refine(routed.size, gcd(routed.block, facts.expert_hidden), ranks)
    return block if block is not None and block >= _FINEST_BLOCK else None


def audit(model: Any) -> None:
    """Check that every MoE layer of a built model is tensor parallel, with no dispatch.

    Args:
        model: the ``torch.nn.Module`` that vLLM built, before its weights are loaded.

    Raises:
        SeamError: a layer holds whole experts, or splits tokens over data-parallel ranks.
    """
    for name, module in model.named_modules():
        parallel = getattr(getattr(module, "moe_config", None), "moe_parallel_config", None)
        if parallel is None:
            continue
        if parallel.use_ep or parallel.ep_size != 1 or parallel.dp_size != 1:
            raise SeamError(
                f"{name}: use_ep={parallel.use_ep}, ep_size={parallel.ep_size}, dp_size={parallel.dp_size} although "
                "the launch was rewritten to tensor parallelism; run with EP2TP=off and report this"
            )
