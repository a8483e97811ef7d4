"""What SGLang itself does with experts: the shapes that it slices exactly, what its kernels take; and the audit."""

from __future__ import annotations

from typing import Any

from ep2tp.errors import LaunchError, ModelError, SeamError
from ep2tp.model.exact import exact_in_engine
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import ClassName

STANDARD_DISPATCHERS = ("StandardDispatcher", "AscendTPDispatcher")  # neither sends a token anywhere


def pads_itself(device: str) -> bool:
    """Whether SGLang grows every MLP of a model by itself (``configs/update_config.py``: on CPUs only)."""
    return device == "cpu"


def left_to_engine(facts: ModelFacts, ranks: int, device: str) -> dict[ClassName, str]:
    """Classes that do not divide into whole blocks but that SGLang slices exactly, and how it does."""
    if ranks == 1:
        return {}
    if pads_itself(device):
        uneven = [c.name for c in facts.classes if c.size % (ranks * c.block)]
        return dict.fromkeys(uneven, "SGLang pads its sizes itself on CPUs (exact)")
    return exact_in_engine(facts, ranks, "sglang")


def multiples(facts: ModelFacts) -> dict[ClassName, int]:
    """Sizes of which one rank's slice of the routed experts has to be a multiple, beside whole blocks.

    Read from SGLang 0.5.23: gated NVFP4 experts that are no multiple of 64 fail an assertion of FlashInfer's CUTLASS
    runner (``modelopt_quant.py``), MXFP4 experts in an FP8 checkpoint need 128 (``mxfp4_flashinfer_cutlass_moe.py``),
    and Marlin, which runs packed integers, works on tiles of 64.
    """
    routed = facts.tensor_class("routed")
    names = {stored.name for stored in routed.formats if stored} if routed else set()
    if "mxfp4" in names and "fp8" in facts.quantization.method:
        return {"routed": 128}
    if "nvfp4" in names or any("int4" in name or "int8" in name for name in names):
        return {"routed": 64}
    return {}


def refuse_wrong_in_sglang(facts: ModelFacts, ranks: int, quantization: str | None, device: str) -> None:
    """Refuse what SGLang slices wrongly over any number of ranks, whether its groups divide or not.

    Read, not run on a GPU: for GPTQ, ``GPTQMarlinMoEScheme`` (0.5.17, 0.5.21, 0.5.23) makes room on each rank for the
    scales of all ranks, and fills its own part; ``moe_wna16_marlin.py`` (0.5.23) divides a slice's size by their
    number, so each scale serves fewer columns than its group has. MoeWNA16 slices the same checkpoint exactly.

    Args:
        facts: the model.
        ranks: those that a rewritten or padded launch slices the routed experts over.
        quantization: ``--quantization``.
        device: SGLang's; Marlin runs on GPUs only.

    Raises:
        ModelError: the routed experts are stored by GPTQ, and Marlin would run them.
    """
    routed = facts.tensor_class("routed")
    is_gptq = routed is not None and any(stored and stored.name.startswith("gptq") for stored in routed.formats)
    if is_gptq and ranks > 1 and quantization != "moe_wna16" and not pads_itself(device):
        raise ModelError(
            f"{facts.source}: SGLang's Marlin kernel takes wrong scales for GPTQ experts that are sliced over {ranks} "
            "ranks; use --quantization moe_wna16, which does not, or run the launch as given with EP2TP=off"
        )


def refuse_expert_parallel_only(quantization: str | None, runner: str, source: str) -> None:
    """Refuse a rewritten launch whose experts SGLang runs under expert parallelism only.

    Read from SGLang 0.5.23, ``minimax_m3_nvfp4.py``: on Blackwell GPUs the experts of MiniMax-M3.1's NVFP4 release need
    MegaMoE or TensorRT-LLM's kernels. Elsewhere SGLang takes Marlin.

    Args:
        quantization, runner: what SGLang resolved ``--quantization`` and ``--moe-runner-backend`` to.
        source: the model's name.

    Raises:
        LaunchError: no runner is chosen that slices these experts.
    """
    if quantization == "minimax_m3_nvfp4" and runner not in ("marlin", "flashinfer_trtllm_routed"):
        raise LaunchError(
            f"{source}: on Blackwell GPUs SGLang runs these NVFP4 experts by MegaMoE, which is expert parallel, or "
            "with --moe-runner-backend flashinfer_trtllm_routed (B200, B300); choose that, or run the launch as given "
            "with EP2TP=off"
        )


def audit(model: Any) -> None:
    """Check that every MoE layer of a loaded model is tensor parallel, with no dispatch.

    Args:
        model: the ``torch.nn.Module`` that SGLang built.

    Raises:
        SeamError: a layer holds whole experts, or sends tokens to other ranks; or layers of experts are not what ep2tp
            knows, so that nothing was audited.
    """
    layers = moe_layers(model)
    if not layers and any(hasattr(module, "experts") for module in model.modules()):
        raise SeamError("no layer of experts looks like SGLang's FusedMoE; run with EP2TP=off and report this")
    if found := expert_parallelism(model):
        raise SeamError(
            f"{found} although the launch was rewritten to tensor parallelism; run with EP2TP=off and report this"
        )


def expert_parallelism(model: Any) -> str | None:
    """The first MoE layer of a loaded model that holds whole experts or sends tokens to other ranks, or None."""
    for name, module in moe_layers(model):
        dispatcher = type(module.dispatcher).__name__
        if module.moe_ep_size != 1 or dispatcher not in STANDARD_DISPATCHERS:
            return f"{name}: moe_ep_size={module.moe_ep_size}, dispatcher={dispatcher}"
    return None


def moe_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers of routed experts (``FusedMoE``) of a model, by name."""
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "moe_ep_size") and hasattr(m, "dispatcher")]
