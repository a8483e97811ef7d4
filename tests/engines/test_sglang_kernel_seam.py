"""Where a kernel of ep2tp's own would go into SGLang: around ``FusedMoE.run_moe_core``, shown with a plain torch one.

The layer, the dispatcher and the function that is wrapped are SGLang's own; only the experts' arithmetic is replaced.
No engine is started.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("sglang")

CHILD = '''
from types import SimpleNamespace

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import get_context, get_parallel

from ep2tp.engines.sglang.seams import KERNEL

EXPERTS, TOP_K, TOKENS, HIDDEN, SIZE = 4, 2, 5, 32, 24
calls = []


def reference(wrapped, layer, args, kwargs):
    """Each token through its experts, one by one, on the slices that this rank holds."""
    dispatched = kwargs.get("dispatch_output") or args[0]
    chosen = dispatched.topk_output
    calls.append(tuple(dispatched.hidden_states.shape))
    output = torch.zeros_like(dispatched.hidden_states)
    for token, values in enumerate(dispatched.hidden_states):
        for weight, expert in zip(chosen.topk_weights[token], chosen.topk_ids[token]):
            gate, up = (layer.w13_weight[expert] @ values).chunk(2)
            output[token] += weight * (layer.w2_weight[expert] @ (torch.nn.functional.silu(gate) * up))
    return StandardCombineInput(hidden_states=output)


torch.manual_seed(0)
published = get_context().override_server_args(model_path="dummy", tp_size=1, device="cpu")
alone = {"tp_rank": 0, "moe_tp_rank": 0, "moe_ep_rank": 0, "tp_group": SimpleNamespace(world_size=1)}
with torch.no_grad(), published, get_parallel().override(**alone):
    layer = FusedMoE(EXPERTS, HIDDEN, SIZE, layer_id=0, top_k=TOP_K, params_dtype=torch.float32)
    for parameter in layer.parameters():
        parameter.normal_()
    weights, ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K)
    chosen = StandardTopKOutput(weights, ids.int(), torch.zeros(TOKENS, EXPERTS))
    values = torch.randn(TOKENS, HIDDEN)
    stock = layer(values.clone(), chosen)
    assert not calls
    KERNEL.wrap(reference)
    ours = layer(values.clone(), chosen)
torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-3)  # values of up to some hundreds
print("CALLS", calls)
'''


def test_a_kernel_around_the_experts_of_one_rank() -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.strip().splitlines()[-1] == "CALLS [(5, 32)]"
