"""ep2tp's kernel on SGLang's own FusedMoE layer and dispatcher, with plain torch standing in for Triton.

No engine is started here; ``test_sglang_kernel.py`` runs one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang")

STAND_IN = Path(__file__).parent / "kernel_stand_in"
SHARED = """
from types import SimpleNamespace

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import get_context, get_parallel

from ep2tp.engines.sglang import kernel
from ep2tp.settings import Kernel

EXPERTS, TOP_K, TOKENS = 4, 2, 5
arguments = SimpleNamespace(enable_lora=False, lora_paths=None, enable_deterministic_inference=False)
torch.manual_seed(0)
published = get_context().override_server_args(model_path="dummy", tp_size=1, device="cpu")
alone = {"tp_rank": 0, "moe_tp_rank": 0, "moe_ep_rank": 0, "tp_group": SimpleNamespace(world_size=1)}
weights, ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K)
chosen = StandardTopKOutput(weights, ids.int(), torch.zeros(TOKENS, EXPERTS))
"""
SEAM = """
import logging
import re
from types import MethodType

from sglang.srt.arg_groups.attention_hook import handle_deterministic_inference
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.server_args import ServerArgs

from ep2tp.errors import LaunchError
from ep2tp.kernels import configs, tuned_configs

HIDDEN, SIZE = 32, 48
lines = []
kernel.logger.addHandler(SimpleNamespace(level=0, handle=lambda record: lines.append(record.getMessage())))
kernel.logger.setLevel(logging.INFO)


def layer(**options):
    made = FusedMoE(EXPERTS, HIDDEN, SIZE, layer_id=0, top_k=TOP_K, params_dtype=torch.float32, **options)
    for parameter in made.parameters():
        parameter.normal_()
    return torch.nn.ModuleDict({"experts": made})


with torch.no_grad(), published, get_parallel().override(**alone):
    model = layer(routed_scaling_factor=2.5)
    values = torch.randn(TOKENS, HIDDEN)
    stock = model["experts"](values.clone(), chosen)
    kernel.install(model, Kernel.AUTO, arguments)
    assert "the engine's: no table of cpu says that ep2tp's is faster on E=4 K=32 I=48 top 2 bf16" in lines.pop()
    assert "run_moe_core" not in vars(model["experts"])
    kernel.install(model, Kernel.EP2TP, arguments)
    assert lines.pop() == "ep2tp kernel: 1 MoE layers: ep2tp's on E=4 K=32 I=48 top 2 bf16, cpu"
    ours = model["experts"](values.clone(), chosen)
    filled = StandardTopKOutput(weights, torch.where(torch.arange(TOKENS)[:, None] < 3, ids, -1).int(), None)
    part = model["experts"](values.clone(), filled)
    torch.testing.assert_close(part[:3], ours[:3], rtol=0, atol=0)
    path = tuned_configs.user_folder() / "sglang" / configs.file_name("cpu", "bf16")
    tuned_configs.write_table(path, {(EXPERTS, HIDDEN, SIZE, TOP_K): [(2, configs.default(2, (9, 0)))]})
    tuned_configs._read_cached.cache_clear()
    other = layer(routed_scaling_factor=2.5)
    other["experts"].load_state_dict(model["experts"].state_dict())
    kernel.install(other, Kernel.AUTO, arguments)
    assert lines.pop().startswith("ep2tp kernel: 1 MoE layers: ep2tp's for M<=2, the engine's above on E=4")
    few = StandardTopKOutput(*(tensor[:2] for tensor in chosen))
    torch.testing.assert_close(other["experts"](values.clone(), chosen), stock, rtol=0, atol=0)  # SGLang's own kernel
    torch.testing.assert_close(other["experts"](values[:2].clone(), few), ours[:2], rtol=1e-5, atol=1e-4)
    path.write_text("{")
    tuned_configs._read_cached.cache_clear()
    kernel.install(layer(), Kernel.AUTO, arguments)
    assert re.search(r"the engine's: .*bf16\\.json: not a table .* delete it and tune again", lines.pop())
    other["experts"].w2_weight = torch.nn.Parameter(other["experts"].w2_weight * 2)  # weights that are loaded again
    torch.testing.assert_close(other["experts"](values[:2].clone(), few) * 1.25, ours[:2], rtol=1e-4, atol=1e-2)
    in_bf16 = StandardTopKOutput(chosen.topk_weights.bfloat16(), *chosen[1:])  # as Llama 4's router gives them
    rounded = StandardTopKOutput(in_bf16.topk_weights.float(), *chosen[1:])
    expected = model["experts"](values.clone(), rounded)
    torch.testing.assert_close(model["experts"](values.clone(), in_bf16), expected, rtol=0, atol=0)
    silent = layer()
    silent["experts"].quant_method.get_triton_quant_info = MethodType(
        FusedMoEMethodBase.get_triton_quant_info, silent["experts"].quant_method
    )
    kernel.install(silent, Kernel.AUTO, arguments)  # ModelOpt's FP8 method inherits one that raises
    assert "does not say where its weights are" in lines.pop()
    on_policy = ServerArgs(model_path="dummy", device="cpu", rl_on_policy_target="fsdp")
    handle_deterministic_inference(on_policy)
    kernel.install(layer(), Kernel.AUTO, on_policy)  # resolved to what it does not ask for by name
    assert "order of summation" in lines.pop()
    lost = layer()
    del lost["experts"].moe_runner_config  # as where another version keeps it elsewhere
    kernel.install(lost, Kernel.AUTO, arguments)
    expected = "not as ep2tp expects (AttributeError: "
    assert expected in lines.pop() and "please report this" in lines.pop()
    try:
        kernel.install(lost, Kernel.EP2TP, arguments)
    except LaunchError as error:
        assert expected in str(error)
    else:
        raise AssertionError("not refused")
    both = {"apply_router_weight_on_input": True, "routed_scaling_factor": 2.5}
    for options, why in (
        ({"activation": "gelu"}, "is gelu"),
        ({"swiglu_limit": 7.0}, "with or without a clamp"),
        (both, "scaling factor to the output"),
    ):
        other = layer(**options)
        try:
            kernel.install(other, Kernel.EP2TP, arguments)
        except LaunchError as error:
            assert re.search(f"EP2TP_KERNEL=ep2tp: experts: .*{why}", str(error)), error
        else:
            raise AssertionError(options)
        kernel.install(other, Kernel.AUTO, arguments)
        assert why in lines.pop()
        assert "run_moe_core" not in vars(other["experts"])
# SGLang's Triton kernels apply the routed scaling factor; on CPUs its models do, after the experts.
torch.testing.assert_close(ours, stock * 2.5, rtol=1e-4, atol=1e-2)  # values of up to some hundreds
"""


FP8_BLOCKS = """
from sglang.srt.layers.quantization.fp8 import Fp8Config

HIDDEN, SIZE, BLOCK = 256, 384, 128


def layer(quantisation):
    options = {"params_dtype": torch.bfloat16, "quant_config": quantisation, "prefix": "experts"}
    return torch.nn.ModuleDict({"experts": FusedMoE(EXPERTS, HIDDEN, SIZE, layer_id=0, top_k=TOP_K, **options)})


with torch.no_grad(), published, get_parallel().override(**alone):
    stored, exact = layer(Fp8Config(True, "dynamic", weight_block_size=[BLOCK, BLOCK])), layer(None)
    held, plain = (dict(model["experts"].named_parameters()) for model in (stored, exact))
    for name in ("w13_weight", "w2_weight"):
        held[name].copy_(torch.randn(held[name].shape).to(held[name].dtype))
        scales = held[f"{name}_scale_inv"]
        scales.copy_(2.0 ** torch.randint(-6, 1, scales.shape))  # powers of two: exact in BF16
        plain[name].copy_(held[name].float() * scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2))
    values = torch.randn(TOKENS, HIDDEN).bfloat16()
    for model in (stored, exact):
        kernel.install(model, Kernel.EP2TP, arguments)
        assert "run_moe_core" in vars(model["experts"])
    ours, expected = (model["experts"](values.clone(), chosen) for model in (stored, exact))
assert expected.float().abs().max() > 100
torch.testing.assert_close(ours, expected, rtol=0, atol=0)
"""


def run(code: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> str:
    """What the code prints, in a process of its own with the stand-in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PYTHONPATH", f"{STAND_IN}:{Path(__file__).parents[2]}")
    child = subprocess.run([sys.executable, "-c", SHARED + code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


def test_a_kernel_on_the_experts_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "STAND-IN ran for M=5, weights [4, 32, 48]" in run(SEAM, monkeypatch, tmp_path)


def test_fp8_blocks_reach_the_kernel_with_their_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as from experts that hold the dequantised values in BF16."""
    assert "STAND-IN ran for M=5, weights [4, 256, 384]" in run(FP8_BLOCKS, monkeypatch, tmp_path)
