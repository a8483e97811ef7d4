"""Rewrites of real ``ServerArgs`` by the installed plugin, resolved by SGLang itself; no engine is started."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

from ep2tp.demo.tiny import TinyModel
from ep2tp.engines.sglang import arguments, experts, late, launch, padding, plugin, seams, worker
from ep2tp.engines.sglang.note import was_seen
from ep2tp.errors import CheckpointError, GuardError, LaunchError, ModelError, PatchError, SeamError
from ep2tp.planner.topology import Links
from ep2tp.rewrite import guard
from ep2tp.settings import Settings
from tests.engines.conftest import tiny_model

DIVIDES = TinyModel(expert_size=96, heads=16, experts=8, dense_size=384)
ODD = TinyModel(expert_size=75, shared_experts=2, dense_size=325, heads=12)

load_plugins()


@pytest.fixture(autouse=True)
def rewrite_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EP2TP", "on")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    guard.disarm()
    worker.state.note = None


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang pads its sizes itself on CPUs only; here ep2tp plans as it does for GPUs."""
    monkeypatch.setattr("ep2tp.engines.sglang.experts.pads_itself", lambda device: False)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What ep2tp writes to SGLang's log, one entry a call."""
    found: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sglang.ep2tp")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)


def server_args(model: Path, **options: Any) -> ServerArgs:
    cpu = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True, "dtype": "float32"}
    return ServerArgs(model_path=str(model), skip_tokenizer_init=True, **(cpu | options))


def resolve(model: Path, **options: Any) -> Any:
    args = server_args(model, **options)
    args.resolve_once()
    return resolved_view(args)


def assert_tensor_parallel(view: Any, ranks: int) -> None:
    assert (view.tp_size, view.ep_size, view.moe_a2a_backend) == (ranks, 1, "none")
    assert (view.dp_size, view.attn_dp_size, view.moe_dp_size, view.dwdp_size) == (1, 1, 1, 1)
    assert view.moe_runner_backend not in ("megamoe", "flashinfer_megamoe")
    assert view.moe_dense_tp_size is None
    assert not any((view.enable_eplb, view.enable_waterfill, view.enable_prefill_cp, view.enable_dp_lm_head))
    assert not any((view.enable_two_batch_overlap, view.enable_single_batch_overlap))


# Every way by which a launch of a model that ep2tp knows asks for expert parallelism.
ALL_TO_ALL = ["deepep", "deepep_v2", "mooncake", "nixl", "mori", "pplx", "megamoe", "flashinfer", "flashinfer_megamoe"]
RECIPES: dict[str, dict[str, Any]] = {
    **{f"a2a-{name}": {"moe_a2a_backend": name} for name in [*ALL_TO_ALL, "ascend_fuseep"]},
    "ep-size": {"ep_size": 2},
    "runner-megamoe": {"moe_runner_backend": "megamoe"},
    "runner-flashinfer-megamoe": {"moe_runner_backend": "flashinfer_megamoe"},
    "waterfill": {"enable_waterfill": True},
    "dwdp": {"dwdp_size": 2},
    "eplb": {"enable_eplb": True},
    "elastic": {"elastic_ep_backend": "mooncake", "max_ep_size": 8},
    "mla-prefill-cp": {"enable_prefill_cp": True},
    "dp-attention": {"enable_dp_attention": True, "dp_size": 2, "moe_a2a_backend": "deepep", "moe_dense_tp_size": 1},
    "attn-dp": {"attn_dp_size": 2, "ep_size": 2, "enable_dp_lm_head": True},
    "moe-dp": {"moe_dp_size": 2, "ep_size": 2},
    "everything": {
        "ep_size": 2,
        "moe_a2a_backend": "deepep",
        "deepep_mode": "normal",
        "speculative_moe_a2a_backend": "deepep",
        "enable_dp_attention": True,
        "dp_size": 2,
        "enable_dp_lm_head": True,
        "enable_dp_attention_local_control_broadcast": True,
        "moe_dense_tp_size": 1,
        "enable_eplb": True,
        "ep_num_redundant_experts": 2,
        "init_expert_location": "/no/such/file.json",
        "ep_dispatch_algorithm": "static",
        "enable_two_batch_overlap": True,
        "enable_single_batch_overlap": True,
        "enable_tp_lm_head_all_to_all": True,
        "deepep_config": "{}",
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_resolves_to_tensor_parallelism(recipe: str, tiny_models: Path) -> None:
    assert_tensor_parallel(resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, **RECIPES[recipe]), 2)
    assert guard.is_armed()


def test_a_prefill_chunk_is_what_sglang_would_have_given_a_data_parallel_rank(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = tiny_model(tiny_models, DIVIDES), {"enable_dp_attention": True, "dp_size": 2, "ep_size": 2}
    chunks = {}
    for mode in ("off", "on"):
        monkeypatch.setenv("EP2TP", mode)
        chunks[mode] = resolve(model, tp_size=2, chunked_prefill_size=8192, **recipe).chunked_prefill_size
    assert chunks == {"off": 4096, "on": 4096}


@pytest.mark.parametrize("strategy", ["zigzag", "interleave"])
def test_sparse_attention_asks_for_deepep_by_its_zigzag_strategy_only(strategy: str) -> None:
    """DSA models (DeepSeek-V3.2, GLM-5) do not run on CPUs, so their row is read off the rules."""
    config = {"kv_lora_rank": 512, "index_topk": 2048}
    values = {"enable_prefill_cp": True, "cp_strategy": strategy}
    left = arguments.without_harmless_prefill_cp(values, config)
    assert ("enable_prefill_cp" in left) is (strategy == "zigzag")
    assert arguments.without_harmless_prefill_cp(values, {"num_key_value_heads": 8}) == {"cp_strategy": strategy}


def test_command_line_spelling(tiny_models: Path) -> None:
    """The published recipe, through SGLang's own parser."""
    model = tiny_model(tiny_models, DIVIDES)
    words = ["--model-path", str(model), "--device", "cpu", "--attention-backend", "torch_native", "--tp", "2"]
    words += ["--enable-dp-attention", "--dp-size", "2", "--ep-size", "2", "--moe-a2a-backend", "deepep"]
    words += ["--enable-eplb", "--ep-num-redundant-experts", "4", "--skip-tokenizer-init"]
    args = prepare_server_args(words)
    args.resolve_once()
    assert_tensor_parallel(resolved_view(args), 2)


def test_elastic_scale_up_is_taken_out(tiny_models: Path) -> None:
    options = {"elastic_ep_backend": "nixl", "ep_join_mode": "scale", "ep_join_rank_offset": 2, "max_ep_size": 4}
    view = resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, elastic_ep_initial_size=2, **options)
    assert_tensor_parallel(view, 2)
    assert (view.elastic_ep_backend, view.ep_join_mode, view.ep_join_rank_offset) == (None, None, 0)


def test_shared_experts_width_needs_no_all_to_all(tiny_models: Path) -> None:
    view = resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2, shared_experts_tp_size=1)
    assert view.shared_experts_tp_size is None


def test_replicas_and_pipeline_stages_stay(tiny_models: Path) -> None:
    args = server_args(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2, dp_size=2, pp_size=2)
    launch.rewrite(args, Settings.from_environment())
    assert (args.tp_size, args.ep_size, args.dp_size, args.pp_size) == (2, 1, 2, 2)


def test_what_a_model_turns_on_again_is_taken_back(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MiniMax-M3.1 NVFP4 does on Blackwell GPUs: its own defaults declare an all-to-all backend."""
    from sglang.srt.arg_groups import model_hook
    from sglang.srt.arg_groups.overrides import declare_resolution

    stock = model_hook.handle_model_specific_adjustments

    def handle_model_specific_adjustments(args: Any) -> None:
        stock(args)
        declare_resolution(args, "a model", moe_a2a_backend="mori")

    monkeypatch.setattr(model_hook, "handle_model_specific_adjustments", handle_model_specific_adjustments)
    assert_tensor_parallel(resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2), 2)


def test_what_cannot_be_taken_back_stops_the_launch(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import serving_hook
    from sglang.srt.arg_groups.overrides import declare_resolution

    def handle_debug_utils(args: Any) -> None:
        declare_resolution(args, "a late step", ep_size=2)

    monkeypatch.setattr(serving_hook, "handle_debug_utils", handle_debug_utils)
    with pytest.raises(LaunchError, match=r"resolved this launch to ep_size=2 although it was rewritten"):
        resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)


@pytest.mark.parametrize("options", [{}, {"attn_dp_size": 2}, {"enable_prefill_cp": False}])
def test_without_ep_settings_the_resolution_is_the_stock_one(
    tiny_models: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_models, DIVIDES)
    args = server_args(model, tp_size=2, **options)
    args.resolve_once()
    monkeypatch.setenv("EP2TP", "off")
    stock = server_args(model, tp_size=2, **options)
    stock.resolve_once()
    random = {"random_seed", "nccl_port", "port"}
    assert {k: v for k, v in args.resolved_dict().items() if k not in random} == {
        k: v for k, v in stock.resolved_dict().items() if k not in random
    }
    assert "_ep2tp" not in vars(args)


def test_off_changes_nothing(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP2TP", "off")
    view = resolve(tiny_model(tiny_models, ODD), tp_size=2, ep_size=2)
    assert (view.ep_size, guard.is_armed()) == (2, False)


def test_auto_rewrites_on_a_machine_without_nvlink(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP2TP", "auto")
    args = server_args(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)
    decision, _ = launch.rewrite(args, Settings.from_environment())
    assert decision.rewrite
    assert "no NVIDIA driver answers" in decision.why


# Padding: what the launch plans, and what its workers learn of it.


def test_odd_sizes_are_planned(tiny_models: Path, as_on_a_gpu: None, messages: list[str]) -> None:
    args = server_args(tiny_model(tiny_models, ODD), tp_size=2, ep_size=2)
    args.resolve_once()
    note = vars(args)["_ep2tp"]
    assert note["rewritten"] and note["model"] == args.model_path
    config = SimpleNamespace(moe_intermediate_size=75, intermediate_size=325)
    worker.state.note = note
    model_config = SimpleNamespace(model_path=args.model_path, hf_config=config, hf_text_config=config)
    grown = worker.initialize_model(lambda config: config.hf_config, None, (model_config,), {})
    # The shared experts, 2 x 75, would need 152; as 2 x 80 they share the field of the routed experts.
    assert (grown.moe_intermediate_size, grown.intermediate_size) == (80, 336)
    assert len(messages) == 1
    for part in ("EP2TP=on", "patch: deepseek_v3", "--ep-size", "+6.7% memory", "kernel: the faster one"):
        assert part in messages[0]


def test_a_draft_is_padded_where_it_is_of_the_same_checkpoint(tiny_models: Path, as_on_a_gpu: None) -> None:
    """An MTP draft is: SGLang loads it as a second model, whose config it reads once more."""
    model = tiny_model(tiny_models, replace(ODD, mtp_layers=1))
    args = server_args(model, tp_size=2)
    args.resolve_once()
    name = "model.layers.3.mlp.experts.0.gate_proj.weight"
    weights = [(name, torch.zeros(75, 256))]
    for path, size in ((str(model), 80), ("/another/draft", 75)):
        config = SimpleNamespace(moe_intermediate_size=75, intermediate_size=325)
        draft = SimpleNamespace(model_path=path, hf_config=config, hf_text_config=config)
        worker.initialize_model(lambda config: None, None, (draft,), {})
        streamed = worker.load_weights(lambda config, model: iter(weights), None, (draft, None), {})
        assert config.moe_intermediate_size == size
        assert [tuple(tensor.shape) for _, tensor in streamed] == [(size, 256)]


def test_on_a_cpu_sglang_pads_itself_and_ep2tp_says_so(tiny_models: Path, messages: list[str]) -> None:
    args = server_args(tiny_model(tiny_models, ODD), tp_size=2)
    args.resolve_once()
    assert "_ep2tp" not in vars(args)
    assert "SGLang pads its sizes itself on CPUs" in messages[0]


def test_the_log_has_one_line_where_nothing_changes(tiny_models: Path, messages: list[str]) -> None:
    resolve(tiny_model(tiny_models, DIVIDES), tp_size=2)
    assert len(messages) == 1
    assert "nothing to pad" in messages[0] and "\n" not in messages[0]


def test_only_the_first_node_reports(tiny_models: Path, messages: list[str]) -> None:
    nodes = {"nnodes": 2, "node_rank": 1, "dist_init_addr": "127.0.0.1:5000"}
    assert_tensor_parallel(resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2, **nodes), 2)
    assert messages == []


def test_user_overrides_of_the_config_are_seen(tiny_models: Path, as_on_a_gpu: None) -> None:
    args = server_args(
        tiny_model(tiny_models, DIVIDES),
        tp_size=2,
        json_model_override_args=json.dumps({"intermediate_size": 325}),
        load_format="dummy",
    )
    args.resolve_once()
    assert padding.plan(args, Settings.from_environment(), False).fields == {"intermediate_size": (325, 336)}  # type: ignore[union-attr]


QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
            }
        },
        "ignore": ["re:.*self_attn.*", "lm_head"],
    },
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*self_attn*", "lm_head"]},
}


@pytest.mark.parametrize(
    ("quantisation", "size", "ranks", "padded"),
    [
        ("fp8", 1408, 2, 1536),
        ("fp8", 1536, 8, 2048),
        ("int4", 1536, 8, 2048),  # 192 a rank: SGLang would give each 1 of its 1.5 groups of scales, in silence
        ("nvfp4", 704, 8, 1024),  # 88 a rank: 5.5 groups of 16, in silence
        ("nvfp4", 1408, 8, 1536),  # 176 a rank are whole groups, which FlashInfer's CUTLASS runner refuses
        ("nvfp4", 2048, 8, 2048),
    ],
)
def test_groups_that_sglang_would_cut_are_padded(
    quantisation: str, size: int, ranks: int, padded: int, tmp_path: Path, as_on_a_gpu: None
) -> None:
    quantization = QUANTISED[quantisation]
    config = DIVIDES.config() | {"moe_intermediate_size": size, "intermediate_size": 2048}
    if quantisation == "nvfp4":
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    else:
        config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = planned(tmp_path, tp_size=ranks)
    assert plan.splits["routed"].padded == padded


def test_gptq_that_marlin_would_run_is_refused(tmp_path: Path, as_on_a_gpu: None) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    config = DIVIDES.config() | {"moe_intermediate_size": 2048, "intermediate_size": 2048, "quantization_config": gptq}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"GPTQ experts that are sliced over 2 ranks; use --quantization moe_wna16"):
        planned(tmp_path, is_rewritten=True, tp_size=2)
    assert not planned(tmp_path, is_rewritten=True, tp_size=2, quantization="moe_wna16").is_padded
    assert not planned(tmp_path, is_rewritten=False, tp_size=2).is_padded  # as the user gave it
    assert not planned(tmp_path, is_rewritten=True, tp_size=1).is_padded


def test_minimax_m31_nvfp4_is_refused_where_sglang_has_no_runner_for_slices(tmp_path: Path, as_on_a_gpu: None) -> None:
    """On Blackwell GPUs SGLang resolves the runner to DeepGEMM, and the dispatch to MegaMoE, which ep2tp takes back."""
    nvfp4 = {"quant_method": "mxfp8", "moe_quant_algo": "NVFP4", "moe_quant_format": "nvfp4-pack-quantized"}
    config = {
        **{"architectures": ["MiniMaxM3SparseForCausalLM"], "model_type": "minimax_m3_text", "hidden_size": 256},
        **{"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 64},
        **{"intermediate_size": 3072, "dense_intermediate_size": 12288, "n_shared_experts": 1, "num_local_experts": 4},
        **{"num_experts_per_tok": 1, "quantization_config": nvfp4},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"tp_size": 2, "quantization": "minimax_m3_nvfp4"}
    with pytest.raises(LaunchError, match=r"MegaMoE.* --moe-runner-backend flashinfer_trtllm_routed"):
        planned(tmp_path, is_rewritten=True, moe_runner_backend="deep_gemm", **options)
    for runner in ("marlin", "flashinfer_trtllm_routed"):
        plan = planned(tmp_path, is_rewritten=True, moe_runner_backend=runner, **options)
        assert (plan.is_padded, plan.unchecked) == (False, {})
        assert [c.format_names for c in plan.facts.classes] == ["nvfp4", "mxfp8", "mxfp8"]


def planned(model: Path, is_rewritten: bool = False, **options: Any) -> Any:
    """The plan of a model that SGLang does not run on this machine."""
    args = server_args(model, load_format="dummy", **options)
    args._resolved_overrides = []
    return padding.plan(args, Settings.from_environment(), is_rewritten)


def test_formats_that_are_not_known_are_refused_where_a_slice_might_cut_a_group(
    tmp_path: Path, as_on_a_gpu: None
) -> None:
    unknown = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
    config = DIVIDES.config() | {"moe_intermediate_size": 1408, "intermediate_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": unknown}))
    with pytest.raises(ModelError, match=r"routed weights are stored by auto-round.*cut a scale group"):
        planned(tmp_path, is_rewritten=True, tp_size=2)
    assert set(planned(tmp_path, tp_size=2).unchecked) == {"routed", "shared"}


def test_load_formats_that_bypass_the_stream_are_refused_where_padding_is_needed(
    tiny_models: Path, as_on_a_gpu: None
) -> None:
    model = tiny_model(tiny_models, ODD)
    with pytest.raises(LaunchError, match="--load-format sharded_state is another"):
        resolve(model, tp_size=2, load_format="sharded_state")
    with pytest.raises(LaunchError, match="--startup-weight-load-mode overlap"):
        resolve(model, tp_size=2, startup_weight_load_mode="overlap")


def test_a_checkpoint_that_does_not_match_its_config_is_refused_before_workers_start(
    tmp_path: Path, as_on_a_gpu: None
) -> None:
    model = ODD.write(tmp_path, "float32")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 77}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.*experts.*75.*moe_intermediate_size=77"):
        resolve(model, tp_size=2)


# What must not run on.


def test_a_worker_without_the_plugin_still_takes_part(tiny_models: Path, as_on_a_gpu: None) -> None:
    """``SGLANG_PLUGINS`` may leave the plugin out of a worker: unpickling the launch's arguments wraps its seams."""
    args = server_args(tiny_model(tiny_models, ODD), tp_size=2, ep_size=2)
    args.resolve_once()
    pickled = tiny_models / "server_args.pickle"
    pickled.write_bytes(pickle.dumps(args))
    code = (
        "import pickle, pathlib, sys\n"
        "args = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "import sglang.srt.model_loader.loader\n"
        "from ep2tp.engines.sglang import seams, worker\n"
        "from ep2tp.rewrite import guard\n"
        "taken = seams.MODEL.is_wrapped(worker.initialize_model), seams.WEIGHTS.is_wrapped(worker.load_weights)\n"
        "print(args._ep2tp['padding']['ranks'], worker.state.is_rewritten, guard.is_armed(), *taken)"
    )
    env = os.environ | {"SGLANG_PLUGINS": "none", "EP2TP": "off"}
    child = subprocess.run([sys.executable, "-c", code, str(pickled)], capture_output=True, text=True, env=env)
    assert child.stdout.strip().splitlines()[-1:] == ["2 True True True True"], child.stderr[-2000:]
    without = code.replace("import pickle", "import sys; sys.modules['ep2tp'] = None\nimport pickle")
    child = subprocess.run([sys.executable, "-c", without, str(pickled)], capture_output=True, text=True, env=env)
    assert child.returncode != 0
    assert "ep2tp" in child.stderr


def test_an_unknown_setting_stops_sglang_with_the_allowed_values() -> None:
    """SGLang logs what a plugin raises, and runs on; a process that exits does not."""
    code = "from sglang.srt.plugins import load_plugins; load_plugins(); print('ran on')"
    for name, value, allowed in (
        ("EP2TP", "maybe", "auto, on, off"),
        ("EP2TP_KERNEL", "triton", "auto, engine, ep2tp"),
    ):
        env = os.environ | {name: value}
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert child.returncode == 1
        assert allowed in child.stderr
        assert "ran on" not in child.stdout


def test_an_engine_whose_seams_changed_is_left_alone_with_a_warning(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], as_on_a_gpu: None
) -> None:
    changed = replace(seams.WEIGHTS, parameters=("self", "something_else"))
    monkeypatch.setattr(seams, "required", lambda: (seams.MODEL, changed))
    view = resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)
    assert (view.ep_size, guard.is_armed()) == (2, False)
    assert len(messages) == 1
    assert "left the launch's parallelism as it is" in messages[0]
    assert "has changed where ep2tp touches it" in messages[0]
    with pytest.raises(SeamError, match=r"needs padding .*_get_all_weights"):
        resolve(tiny_model(tiny_models, ODD), tp_size=2)
    monkeypatch.setenv("EP2TP_STRICT", "1")
    with pytest.raises(SeamError, match="_get_all_weights"):
        resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)


def test_a_seam_that_did_not_take_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.seam_problem(Settings.from_environment()) is None
    monkeypatch.setattr(worker, "load_weights", lambda *args: None)  # what is wrapped now is another function
    assert "did not take" in (launch.seam_problem(Settings.from_environment()) or "")


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0"])
def test_an_unknown_version_is_left_alone_unless_the_user_insists(
    version: str, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seams, "version", lambda: version)
    monkeypatch.setenv("EP2TP", "auto")
    args = server_args(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)
    decision, changes = launch.rewrite(args, Settings.from_environment())
    assert (decision.is_warning, changes, args.ep_size) == (True, [], 2)
    assert f"knows SGLang 0.5.17 to 0.5.23, not {version}" in decision.why


def test_no_buffer_is_made_in_a_rewritten_launch(tiny_models: Path) -> None:
    from sglang.srt.layers.moe.token_dispatcher import deepep, deepep_v2, mooncake, moriep, nixl, pplx

    makers = [
        lambda: deepep.DeepEPBuffer.get_deepep_buffer(None, 1, 1, None),
        lambda: deepep_v2.DeepEPv2Buffer.get_buffer(None, 1, 1),
        lambda: mooncake.EPBuffer.get_ep_buffer(None, 1, 1, None),
        lambda: nixl.NixlEPBuffer.get_nixl_buffer(None, 1, None),
        lambda: pplx.PplxAllToAllManager.get_all_to_all(None, 1, 1),
        lambda: moriep.init_mori_op(None, 1, 1),
        lambda: moriep.init_mori_epv2_op(None, 1, 1),
    ]
    assert len(makers) == len(seams.BUFFERS)
    for make in makers:  # not rewritten: SGLang's own functions, which lack their libraries or arguments here
        with pytest.raises(Exception) as found:
            make()
        assert not isinstance(found.value, GuardError)
    resolve(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)
    for make in makers:
        with pytest.raises(GuardError, match="rewritten to tensor parallelism"):
            make()


@pytest.mark.parametrize(("ep_size", "dispatcher"), [(2, "StandardDispatcher"), (1, "MaybeTboDeepEPDispatcher")])
def test_the_audit_finds_whole_experts_and_dispatchers(ep_size: int, dispatcher: str) -> None:
    layer = SimpleNamespace(moe_ep_size=ep_size, dispatcher=type(dispatcher, (), {})())
    model = SimpleNamespace(named_modules=lambda: [("model.layers.1.mlp.experts", layer)], modules=lambda: [layer])
    worker.state.note = {"rewritten": True, "padding": None}  # type: ignore[assignment]
    runner = SimpleNamespace(model=model, is_draft_worker=False)
    with pytest.raises(SeamError, match=rf"experts: moe_ep_size={ep_size}, dispatcher={dispatcher}"):
        worker.load_model(lambda: None, runner, (), {})


def test_an_audit_of_nothing_is_an_error() -> None:
    """Where SGLang changes its layers, the audit must not pass because it sees none."""
    layer, block = SimpleNamespace(), SimpleNamespace(experts=SimpleNamespace())
    model = SimpleNamespace(named_modules=lambda: [("mlp", block), ("mlp.experts", layer)], modules=lambda: [block])
    with pytest.raises(SeamError, match="no layer of experts looks like SGLang's FusedMoE"):
        experts.audit(model)


def test_a_model_that_was_not_padded_is_noticed(tiny_models: Path, as_on_a_gpu: None) -> None:
    args = server_args(tiny_model(tiny_models, ODD), tp_size=2)
    args.resolve_once()
    config = SimpleNamespace(moe_intermediate_size=75, intermediate_size=325)
    model_config = SimpleNamespace(model_path=args.model_path, hf_config=config, hf_text_config=config)
    model = SimpleNamespace(load_weights=list, named_modules=lambda: [])
    runner = SimpleNamespace(model_config=model_config, is_draft_worker=False, model=model)
    with pytest.raises(SeamError, match="was to be padded and was not"):
        worker.load_model(lambda: None, runner, (), {})
    worker.initialize_model(lambda config: None, None, (model_config,), {})
    worker.load_model(lambda: None, runner, (), {})
    assert model.load_weights is not list, "what the model is given in place is padded"


# Launches of a program that loads plugins too late.


LATE = """
import json, pickle, sys
from sglang.srt.server_args import ServerArgs
args = ServerArgs(model_path=sys.argv[1], tp_size=2, ep_size=2, device="cpu", attention_backend="torch_native",
                  disable_cuda_graph=True, skip_tokenizer_init=True, **json.loads(sys.argv[2]))
getattr(args, "resolve_once", lambda: None)()
sys.stdout.buffer.write(b"\\n" + pickle.dumps(args).hex().encode())
"""


@pytest.mark.parametrize("mode", ["on", "auto", "off"])
def test_a_launch_that_was_resolved_before_plugins_were_loaded_is_noticed(
    mode: str, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    args = resolved_without_plugins(tiny_model(tiny_models, DIVIDES))
    assert resolved_view(args).ep_size == 2
    layer = SimpleNamespace(moe_ep_size=2, dispatcher=type("StandardDispatcher", (), {})())
    model = SimpleNamespace(named_modules=lambda: [("model.layers.1.mlp.experts", layer)])
    config = SimpleNamespace(model_path=args.model_path)
    runner = SimpleNamespace(model=model, is_draft_worker=False, server_args=args, model_config=config)
    monkeypatch.setenv("EP2TP", mode)
    monkeypatch.setenv("EP2TP_KERNEL", "engine")
    worker.load_model(lambda: None, runner, (), {})
    assert len(messages) == (mode != "off")
    assert all("load_plugins() before it makes a ServerArgs" in message for message in messages)
    if mode != "off":
        monkeypatch.setenv("EP2TP_STRICT", "1")
        with pytest.raises(LaunchError, match="resolved this launch before it loaded plugins"):
            worker.load_model(lambda: None, runner, (), {})


def test_a_late_launch_is_judged_by_the_gpus_that_it_names(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    args = resolved_without_plugins(tiny_model(tiny_models, DIVIDES), base_gpu_id=4)
    seen: list[Any] = []
    monkeypatch.setenv("EP2TP", "auto")
    monkeypatch.setattr("ep2tp.engines.sglang.late.links_of_job", lambda *job: seen.append(job) or Links(True, "test"))
    layer = SimpleNamespace(moe_ep_size=2, dispatcher=type("StandardDispatcher", (), {})())
    model = SimpleNamespace(named_modules=lambda: [("model.layers.1.mlp.experts", layer)])
    late.report(SimpleNamespace(model=model, server_args=args), Settings.from_environment())
    assert (seen, messages) == ([(2, (4, 5))], [])


def test_a_launch_that_ep2tp_left_alone_is_not_taken_for_one_that_it_never_saw(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "seam_problem", lambda settings: "this SGLang is unknown")
    args = server_args(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)
    args.resolve_once()
    assert was_seen(pickle.loads(pickle.dumps(args)))


def resolved_without_plugins(model: Path, **options: Any) -> Any:
    """What a worker gets of a program that loads no plugin."""
    run = subprocess.run([sys.executable, "-c", LATE, str(model), json.dumps(options)], capture_output=True, check=True)
    return pickle.loads(bytes.fromhex(run.stdout.splitlines()[-1].decode()))


def test_gpus_that_a_launch_names_are_looked_at(tiny_models: Path, jobs: list[Any]) -> None:
    model = tiny_model(tiny_models, DIVIDES)
    for options in ({}, {"base_gpu_id": 4}, {"base_gpu_id": 1, "gpu_id_step": 2}, {"base_gpu_id": 4, "nnodes": 2}):
        launch.rewrite(server_args(model, tp_size=4, ep_size=4, **options), Settings.from_environment())
    assert [devices for _, devices, _ in jobs] == [(), (4, 5, 6, 7), (1, 3, 5, 7), ()]


def test_weights_in_one_file_are_not_read_as_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would read all of a GGUF file as JSON."""
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda *_, **__: pytest.fail("read it"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert launch.read_config(server_args(tmp_path / "model.gguf", tp_size=2)) is None


# What is refused, and what is left alone.


def test_a_model_without_experts_is_left_alone(tmp_path: Path) -> None:
    dense = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}
    dense |= {"num_attention_heads": 4, "intermediate_size": 99, "vocab_size": 64, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    args = server_args(tmp_path, tp_size=2, ep_size=2)
    decision, changes = launch.rewrite(args, Settings.from_environment())
    assert (decision.rewrite, changes, args.ep_size) == (False, [], 2)
    assert "no routed experts" in decision.why


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    """Among them one that runs under expert parallelism only."""
    config = DIVIDES.config() | {"architectures": ["MuseSparkForConditionalGeneration"], "model_type": "muse_spark"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PatchError, match=r"MuseSparkForConditionalGeneration.*EP2TP_PATCH_PATH"):
        launch.rewrite(server_args(tmp_path, tp_size=2, ep_size=2), Settings.from_environment())


def test_heads_that_do_not_divide_are_refused(tiny_models: Path) -> None:
    args = server_args(tiny_model(tiny_models, DIVIDES), tp_size=3, ep_size=3)
    with pytest.raises(LaunchError, match=r"16 attention heads.*Sizes up to 3 that work: 1, 2"):
        launch.rewrite(args, Settings.from_environment())


def test_a_config_that_cannot_be_read_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    args = server_args(Path("no/such-model"), tp_size=2, ep_size=2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would be asked several times
    decision, changes = launch.rewrite(args, Settings.from_environment())
    assert (decision.is_warning, changes, args.ep_size) == (True, [], 2)
    monkeypatch.setenv("EP2TP_STRICT", "1")
    with pytest.raises(ModelError, match="cannot be read"):
        launch.rewrite(args, Settings.from_environment())


def test_a_launch_without_a_model_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "read_config", lambda args: pytest.fail("looked for a model named dummy"))
    assert resolve(Path("dummy"), tp_size=2, ep_size=2).ep_size == 2


def test_a_later_launch_of_the_same_process_is_not_guarded(tiny_models: Path) -> None:
    model = tiny_model(tiny_models, DIVIDES)
    resolve(model, tp_size=2, ep_size=2)
    assert guard.is_armed() and worker.state.is_rewritten
    resolve(model, tp_size=2)
    assert not guard.is_armed() and not worker.state.is_rewritten


def test_a_later_launch_with_ep2tp_off_is_left_alone(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_models, DIVIDES)
    resolve(model, tp_size=2, ep_size=2)
    monkeypatch.setenv("EP2TP", "off")
    view = resolve(model, tp_size=2, ep_size=2)
    assert (view.ep_size, guard.is_armed(), worker.state.is_rewritten) == (2, False, False)


def test_a_copy_of_the_arguments_joins_no_launch(tiny_models: Path) -> None:
    args = server_args(tiny_model(tiny_models, DIVIDES), tp_size=2, ep_size=2)
    args.resolve_once()
    copy.deepcopy(args)
    pickle.loads(pickle.dumps(args))
    assert not worker.state.joined


def test_registering_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys; from ep2tp.engines.sglang.plugin import register; register(); register(); "
        "print(sorted({'torch', 'sglang', 'transformers', 'pydantic', 'rich', 'numpy'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_both_plugins_are_entry_points() -> None:
    from importlib.metadata import entry_points

    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        assert "ep2tp" in [entry.name for entry in entry_points(group=group)]
    assert plugin.register.__module__ == "ep2tp.engines.sglang.plugin"
