"""What vLLM itself does with experts: which odd shapes it slices exactly, and whether a loaded model is really TP."""

from __future__ import annotations

import importlib
from typing import Any

from ep2tp.errors import SeamError
from ep2tp.model.exact import exact_in_engine, refined_block
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import ClassName

_FP8_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.fp8"


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
    block = refined_block(facts, ranks) if moe_backend in ("auto", "triton") else None
    if block and hasattr(importlib.import_module(_FP8_ORACLE), "refine_fp8_moe_block_shape"):
        handled["routed"] = f"vLLM repeats the scales on a {block}x{block} grid (exact, Triton kernels)"
    return handled


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
