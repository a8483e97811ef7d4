"""Puts ep2tp's fused-MoE kernel on the loaded MoE layers of an SGLang model.

What is replaced is ``run_moe_core`` of each ``FusedMoE`` layer that the kernel takes: it runs a rank's experts on
tokens that the standard dispatcher left where they are. The class is left alone.
"""

from __future__ import annotations

import logging
from typing import Any

from ep2tp.engines.kernel import Device, LayerKernel, put_on_layers, seam_holds, this_device
from ep2tp.engines.loaded_experts import Experts, UnfitError, expert_weights
from ep2tp.engines.sglang import seams
from ep2tp.engines.sglang.experts import STANDARD_DISPATCHERS, moe_layers
from ep2tp.settings import Kernel

logger = logging.getLogger("sglang.ep2tp")


def install(model: Any, kernel: Kernel, arguments: Any) -> None:
    """Put ep2tp's kernel on every MoE layer of a loaded model that it takes, and log whose kernel runs when.

    Args:
        model: the ``torch.nn.Module`` that SGLang loaded.
        kernel: ``EP2TP_KERNEL``, which is not ``engine``.
        arguments: the worker's ``ServerArgs``: what it was resolved to counts, not what was asked for.

    Raises:
        LaunchError: ``EP2TP_KERNEL=ep2tp``, and a layer that ep2tp's kernel does not take.
        SeamError: ``EP2TP_KERNEL=ep2tp``, and this SGLang does not run experts as ep2tp expects.
    """
    if not seam_holds(seams.KERNEL, kernel, logger):
        return
    from ep2tp.engines.sglang.launch import resolved

    is_forced, device, arguments = kernel is Kernel.EP2TP, this_device(), resolved(arguments)
    lines = put_on_layers(moe_layers(model), lambda layer: _put(layer, device, is_forced, arguments), kernel, logger)
    for line in lines:
        logger.info("%s", line)


def _put(layer: Any, device: Device, is_forced: bool, arguments: Any) -> str:
    ours = LayerKernel(_experts(layer, arguments), "sglang", device, is_forced)
    tensors = _tensors(layer)
    scaling = layer.moe_runner_config.routed_scaling_factor
    engine_core = layer.run_moe_core

    def run_moe_core(dispatch_output: Any) -> Any:
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        is_plain = dispatch_output.hidden_states_scale is None and hasattr(topk, "topk_ids")
        config = ours.config(x.shape[0]) if is_plain and _tensors(layer) == tensors else None
        if config is None:
            return engine_core(dispatch_output=dispatch_output)
        weights = topk.topk_weights.float()  # Llama 4's come in BF16
        weights = weights if scaling in (None, 1.0) else weights * scaling
        return StandardCombineInput(hidden_states=ours(x, weights, topk.topk_ids, config))

    text = str(ours)
    if text.startswith("ep2tp"):
        layer.run_moe_core = run_moe_core
    return text


def _tensors(layer: Any) -> tuple[int, ...]:
    """Where a layer's weights and scales are; weights that are loaded again may lie elsewhere."""
    found = layer.quant_method.get_triton_quant_info(layer)
    tensors = (found.w13_weight, found.w2_weight, found.w13_scale, found.w2_scale)
    return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)


def _experts(layer: Any, arguments: Any) -> Experts:
    """The layer's experts as ep2tp's kernel takes them.

    Raises:
        UnfitError: it does not take them.
    """
    from ep2tp.kernels.operands import Activation

    method, config = layer.quant_method, layer.moe_runner_config
    runner = getattr(method, "runner", None)
    if runner is None:
        raise UnfitError(f"SGLang's {type(method).__name__} runs its experts in a way of its own")
    if not runner.runner_backend.is_triton():
        name = runner.runner_backend.value
        raise UnfitError(f"SGLang's {name} keeps weights in a layout of its own (--moe-runner-backend triton does not)")
    if layer.moe_ep_size != 1 or type(layer.dispatcher).__name__ not in STANDARD_DISPATCHERS:
        raise UnfitError("the layer is not tensor parallel")
    if getattr(arguments, "enable_lora", False) or getattr(arguments, "lora_paths", None):
        raise UnfitError("LoRA adapters are on")
    if getattr(arguments, "enable_deterministic_inference", False):
        raise UnfitError("--enable-deterministic-inference: its order of summation depends on the number of tokens")
    if getattr(arguments, "enable_torch_compile", False):
        raise UnfitError("--enable-torch-compile traces the experts")
    if config.activation != "silu" or not config.is_gated or _clamps(config):
        raise UnfitError(f"the activation is {config.activation}, with or without a clamp, not plain silu")
    if config.no_combine or config.use_tp_all_gather_activation:
        raise UnfitError("the caller combines the experts' outputs")
    if getattr(layer, "use_intel_amx_backend", False):
        raise UnfitError("the weights are packed for AMX")
    if config.apply_router_weight_on_input and config.routed_scaling_factor not in (None, 1.0):
        raise UnfitError("router weights go to the input, and their scaling factor to the output")
    try:
        found = method.get_triton_quant_info(layer)
    except (NotImplementedError, AttributeError):
        raise UnfitError(f"SGLang's {type(method).__name__} does not say where its weights are") from None
    if getattr(found, "fuse_swiglu_interleaved", False) or getattr(found, "use_mxfp8", False):
        raise UnfitError("SGLang interleaved gate and up, or stores MXFP8")
    gate_up = expert_weights(found.w13_weight, found.w13_scale, found.block_shape, found.b13)
    down = expert_weights(found.w2_weight, found.w2_scale, found.block_shape, found.b2)
    experts = Experts(gate_up, down, Activation.SILU, config.top_k, config.apply_router_weight_on_input)
    experts.check(config.params_dtype)
    return experts


def _clamps(config: Any) -> bool:
    limits = (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
    return any(limit is not None for limit in limits)
