"""In every process of an engine on a CPU: ep2tp's kernel is its plain torch reference, in 32 bits as in 16.

In 32 bits the order of summation changes no token. vLLM's CPU kernels repack the weights; here they stay as they were
loaded, as vLLM's Triton kernels leave them on GPUs, so that vLLM's own kernel would compute garbage: right tokens come
through ep2tp's seam.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import wrapt

_CPU_EXPERTS = {"CPUUnquantizedExperts", "X86CPUUnquantizedExperts"}


def _keep_layout(cpu_moe: Any) -> None:
    cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = lambda self, layer: None


def _take_cpus(loaded_experts: Any) -> None:
    loaded_experts.DEVICES |= {"cpu"}


def _take_cpu_experts(kernel: Any) -> None:
    kernel.KEPT_LAYOUT |= _CPU_EXPERTS


def _accept_32_bits(operands: Any) -> None:
    check = operands.check_operands

    def halved(weights: Any) -> Any:
        values = weights.values
        return replace(weights, values=values.bfloat16()) if values.element_size() == 4 else weights

    def check_as_16_bits(x: Any, gate_up: Any, down: Any, *rest: Any) -> None:
        check(x.bfloat16(), halved(gate_up), halved(down), *rest)

    operands.check_operands = check_as_16_bits


def _use_reference(module: Any) -> None:
    from ep2tp.kernels.operands import check_operands
    from ep2tp.kernels.reference import fused_moe_reference

    calls: list[int] = []

    def fused_moe(x: Any, gate_up: Any, down: Any, weights: Any, ids: Any, *, config: Any, **options: Any) -> Any:
        check_operands(x, gate_up, down, weights, ids, None)
        if x.shape[0] not in calls:
            calls.append(x.shape[0])
            print(f"STAND-IN ran for M={x.shape[0]}, weights {list(down.values.shape)}", flush=True)
        return fused_moe_reference(x, gate_up, down, weights, ids, **options).to(x.dtype)

    module.fused_moe = fused_moe


for name, hook in (
    ("vllm.model_executor.layers.fused_moe.experts.cpu_moe", _keep_layout),
    ("ep2tp.engines.loaded_experts", _take_cpus),
    ("ep2tp.engines.vllm.kernel", _take_cpu_experts),
    ("ep2tp.kernels.operands", _accept_32_bits),
    ("ep2tp.kernels.fused_moe", _use_reference),
):
    wrapt.register_post_import_hook(hook, name)
