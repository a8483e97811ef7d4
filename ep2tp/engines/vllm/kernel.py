"""Puts ep2tp's fused-MoE kernel on the loaded MoE layers of a vLLM model.

What is replaced is ``apply`` of a layer's own ``FusedMoEKernel`` object, before which nothing is quantised and after
which nothing is left to reduce: ep2tp's kernel takes 16-bit activations, and saves the launch that makes FP8 of them.
The class is left alone. Where vLLM makes the object anew (weights that are loaded again), its own kernel is back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ep2tp.engines.kernel import Device, LayerKernel, put_on_layers, seam_holds, this_device
from ep2tp.engines.loaded_experts import Experts, UnfitError, expert_weights
from ep2tp.engines.vllm import seams
from ep2tp.settings import Kernel

if TYPE_CHECKING:
    from ep2tp.kernels.operands import Activation

logger = logging.getLogger("vllm.ep2tp")

KEPT_LAYOUT = {"TritonExperts", "TritonOrCutlassExperts"}
"""vLLM's expert classes that read weights as checkpoints have them: [E, 2I, K] and [E, K, I], scales row by row."""

_SWIGLU_OAI = (1.702, 1.0, 7.0)  # alpha, beta and limit of gpt-oss


def install(model: Any, kernel: Kernel) -> None:
    """Put ep2tp's kernel on every MoE layer of a loaded model that it takes, and log whose kernel runs when.

    Args:
        model: the ``torch.nn.Module`` that vLLM loaded, its weights in the layout that their kernels take.
        kernel: ``EP2TP_KERNEL``, which is not ``engine``.

    Raises:
        LaunchError: ``EP2TP_KERNEL=ep2tp``, and a layer that ep2tp's kernel does not take.
        SeamError: ``EP2TP_KERNEL=ep2tp``, and this vLLM's kernels are not called as ep2tp expects.
    """
    if not seam_holds(seams.KERNEL, kernel, logger):
        return
    is_forced, device = kernel is Kernel.EP2TP, this_device()
    lines = put_on_layers(_layers(model), lambda layer: _put(layer, device, is_forced), kernel, logger)
    if _is_first_rank():
        for line in lines:
            logger.info("%s", line)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that hold a layer's experts, by name; a module that shares another's kernel is left out."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight") and id(kernel) not in seen:
            seen.add(id(kernel))
            yield name, module


def _put(layer: Any, device: Device, is_forced: bool) -> str:
    kernel = layer.quant_method.moe_kernel
    ours = LayerKernel(_experts(layer, kernel), "vllm", device, is_forced)
    engine_apply = kernel.apply

    def apply(hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *args: Any, **kwargs: Any) -> Any:
        config = ours.config(hidden_states.shape[0]) if w1 is ours.experts.gate_up.values else None
        if config is None:
            return engine_apply(hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs)
        return ours(hidden_states, topk_weights, topk_ids, config)

    text = str(ours)
    if text.startswith("ep2tp"):
        kernel.apply = apply
    return text


def _experts(layer: Any, kernel: Any) -> Experts:
    """The layer's experts as ep2tp's kernel takes them.

    Raises:
        UnfitError: it does not take them.
    """
    from vllm import envs

    experts, moe = kernel.fused_experts, layer.moe_config
    parallel = moe.moe_parallel_config
    if type(experts).__name__ not in KEPT_LAYOUT:
        raise UnfitError(
            f"vLLM's {type(experts).__name__} keeps weights in a layout of its own (--moe-backend triton does not)"
        )
    if parallel.use_ep or parallel.dp_size != 1 or layer.expert_map is not None:
        raise UnfitError("the layer is not tensor parallel")
    if type(kernel.prepare_finalize).__name__ != "MoEPrepareAndFinalizeNoDPEPModular":
        raise UnfitError(f"vLLM's {type(kernel.prepare_finalize).__name__} works around the experts")
    if moe.is_lora_enabled:
        raise UnfitError("LoRA adapters are on")
    if envs.VLLM_BATCH_INVARIANT:
        raise UnfitError("VLLM_BATCH_INVARIANT=1, and its order of summation depends on the number of tokens")
    quantised = experts.quant_config
    block = quantised.block_shape
    found = Experts(
        expert_weights(layer.w13_weight, quantised.w1_scale, block, quantised.w1_bias),
        expert_weights(layer.w2_weight, quantised.w2_scale, block, quantised.w2_bias),
        _activation(layer.activation.value, quantised, moe),
        moe.experts_per_token,
        layer.apply_router_weight_on_input,
    )
    found.check(moe.in_dtype)
    return found


def _activation(name: str, quantised: Any, moe: Any) -> Activation:
    """vLLM's activation as ep2tp's kernel has it; its parameters are in either of two configs."""
    from ep2tp.kernels.operands import Activation

    first = (quantised.gemm1_alpha, quantised.gemm1_beta, quantised.gemm1_clamp_limit)
    second = (moe.swiglu_alpha, moe.swiglu_beta, moe.swiglu_limit)
    given = tuple(b if a is None else a for a, b in zip(first, second, strict=True))
    if name == "silu" and given == (None, None, None):
        return Activation.SILU
    if name == "swigluoai" and all(value in (None, usual) for value, usual in zip(given, _SWIGLU_OAI, strict=True)):
        return Activation.SWIGLU_OAI
    if name == "swigluoai_uninterleave" and given == _SWIGLU_OAI:
        return Activation.SWIGLU_OAI_SPLIT
    raise UnfitError(f"the activation is {name} with alpha, beta and limit {given}")


def _is_first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)
