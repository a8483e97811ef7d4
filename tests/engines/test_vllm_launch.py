"""Rewrites of real ``EngineArgs`` by the installed plugin, up to the engine config that workers would get."""

from __future__ import annotations

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

vllm = pytest.importorskip("vllm")

from vllm.config.parallel import EPLBConfig
from vllm.engine.arg_utils import EngineArgs

from ep2tp.demo.tiny import TinyModel
from ep2tp.engines.vllm import launch, padding, seams
from ep2tp.errors import (
    CheckpointError,
    LaunchError,
    ModelError,
    PatchError,
    SeamError,
    SettingError,
)
from ep2tp.planner.topology import Links
from ep2tp.rewrite import guard
from ep2tp.settings import Settings
from tests.engines.conftest import tiny_model

DIVIDES = TinyModel(expert_size=96, heads=16, experts=8, dense_size=384)
ODD = TinyModel(expert_size=75, shared_experts=2, dense_size=325, heads=12)


@pytest.fixture(autouse=True)
def rewrite_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EP2TP", "on")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    guard.disarm()


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What ep2tp writes to vLLM's log, one entry a call."""
    found: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.ep2tp")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def engine_args(model: Path, **options: Any) -> EngineArgs:
    return EngineArgs(model=str(model), skip_tokenizer_init=True, max_model_len=64, dtype="float32", **options)


def engine_config(model: Path, **options: Any) -> Any:
    return engine_args(model, **options).create_engine_config()


def test_ep_flag_is_cleared_and_dp_is_folded(tiny_models: Path) -> None:
    config = engine_config(tiny_model(tiny_models, DIVIDES), data_parallel_size=4, enable_expert_parallel=True)
    parallel = config.parallel_config
    assert (parallel.tensor_parallel_size, parallel.data_parallel_size) == (4, 1)
    assert (parallel.enable_expert_parallel, parallel.all2all_backend) == (False, "allgather_reducescatter")
    assert parallel.world_size == 4


def test_everything_bound_to_ep_is_reset(tiny_models: Path) -> None:
    parallel = engine_config(
        tiny_model(tiny_models, DIVIDES),
        tensor_parallel_size=2,
        data_parallel_size=2,
        enable_expert_parallel=True,
        all2all_backend="deepep_low_latency",
        enable_eplb=True,
        eplb_config=EPLBConfig(num_redundant_experts=8),
        enable_ep_weight_filter=True,
        expert_placement_strategy="round_robin",
        enable_dbo=True,
    ).parallel_config
    assert parallel.tensor_parallel_size == 4
    assert not any((parallel.enable_eplb, parallel.enable_ep_weight_filter, parallel.enable_dbo))
    assert parallel.eplb_config.num_redundant_experts == 0
    assert parallel.expert_placement_strategy == "linear"


def test_an_ep_only_backend_is_reset(tiny_models: Path) -> None:
    args = engine_args(tiny_model(tiny_models, DIVIDES), tensor_parallel_size=2, moe_backend="deep_gemm_mega_moe")
    launch.rewrite(args, Settings.from_environment())
    assert args.moe_backend == "auto"


def test_pipeline_stages_stay(tiny_models: Path) -> None:
    args = engine_args(
        tiny_model(tiny_models, DIVIDES), pipeline_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True
    )
    launch.rewrite(args, Settings.from_environment())
    assert (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size) == (2, 2, 1)


def test_ray_placement_moves_to_the_tensor_parallel_ranks(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "")  # and takes back what the rewrite sets
    args = engine_args(
        tiny_model(tiny_models, DIVIDES),
        data_parallel_size=2,
        data_parallel_backend="ray",
        enable_expert_parallel=True,
    )
    launch.rewrite(args, Settings.from_environment())
    assert (args.data_parallel_backend, args.distributed_executor_backend) == ("mp", "ray")
    assert os.environ["VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"] == "EP2TP"


def test_multi_node_settings_stay(tiny_models: Path) -> None:
    options: dict[str, Any] = {"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1", "master_port": 2900}
    args = engine_args(tiny_model(tiny_models, DIVIDES), tensor_parallel_size=4, enable_expert_parallel=True, **options)
    launch.rewrite(args, Settings.from_environment())
    assert args.tensor_parallel_size == 4
    assert {name: getattr(args, name) for name in options} == options


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}])
def test_without_ep_flags_the_parallel_config_is_the_stock_one(
    tiny_models: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_models, DIVIDES)
    rewritten = engine_config(model, **options)
    monkeypatch.setenv("EP2TP", "off")
    stock = EngineArgs.create_engine_config.__wrapped__(engine_args(model, **options))
    assert rewritten.parallel_config.compute_hash() == stock.parallel_config.compute_hash()
    assert rewritten.model_config.hf_config.to_dict() == stock.model_config.hf_config.to_dict()


def test_odd_sizes_grow_in_the_config(tiny_models: Path) -> None:
    config = engine_config(tiny_model(tiny_models, ODD), tensor_parallel_size=2)
    hf_config = config.model_config.hf_config
    # The shared experts, 2 x 75, would need 152; as 2 x 80 they share the field of the routed experts.
    assert (hf_config.moe_intermediate_size, hf_config.intermediate_size) == (80, 336)
    plan = padding.plan_of(config.model_config, Settings.from_environment())
    assert plan is not None
    assert {name: (split.size, split.padded) for name, split in plan.splits.items()} == {
        "routed": (75, 80),
        "shared": (150, 160),
        "dense": (325, 336),
    }


def test_an_mtp_draft_grows_with_its_target(tiny_models: Path) -> None:
    model = tiny_model(tiny_models, replace(ODD, mtp_layers=1, seed=1))
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    config = engine_config(model, tensor_parallel_size=2, speculative_config=speculation)
    draft = config.speculative_config.draft_model_config
    assert (draft.hf_config.moe_intermediate_size, draft.hf_config.intermediate_size) == (80, 336)
    plan = padding.plan_of(draft, Settings.from_environment())
    assert plan is not None
    mtp_expert = plan.tensor("model.layers.3.mlp.experts.0.gate_proj.weight", (75, 256), "F32")
    assert mtp_expert is not None
    assert mtp_expert.is_padded


def test_a_draft_named_by_another_spelling_of_its_targets_folder_grows_too(tiny_models: Path) -> None:
    model = tiny_model(tiny_models, replace(ODD, mtp_layers=1, seed=1))
    speculation = {"method": "mtp", "num_speculative_tokens": 1, "model": f"{model}/"}
    config = engine_config(model, tensor_parallel_size=2, speculative_config=speculation)
    assert config.speculative_config.draft_model_config.hf_config.moe_intermediate_size == 80


@pytest.mark.parametrize(("ranks", "mode"), [(4, "weights"), (8, "data")])
def test_an_image_encoder_whose_heads_do_not_divide_is_not_sliced(tmp_path: Path, ranks: int, mode: str) -> None:
    """vLLM stops at ``12 is not divisible by 8`` there."""
    config = {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "model_type": "glm4v_moe",
        "text_config": {
            "model_type": "glm4v_moe_text",
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 46,
            "first_k_dense_replace": 1,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "vocab_size": 151552,
        },
        "vision_config": {"num_heads": 12, "hidden_size": 1536},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = engine_args(tmp_path, data_parallel_size=ranks, enable_expert_parallel=True)
    decision, changes = launch.rewrite(args, Settings.from_environment())
    assert decision.rewrite
    assert (args.tensor_parallel_size, args.mm_encoder_tp_mode) == (ranks, mode)
    assert ("--mm-encoder-tp-mode" in {c.setting.flags[0] for c in changes}) is (mode == "data")


def test_user_overrides_of_the_config_are_seen(tiny_models: Path) -> None:
    config = engine_config(
        tiny_model(tiny_models, DIVIDES),
        tensor_parallel_size=2,
        hf_overrides={"intermediate_size": 325},
        load_format="dummy",
    )
    assert config.model_config.hf_config.intermediate_size == 336


def test_auto_rewrites_on_a_machine_without_nvlink(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP2TP", "auto")
    args = engine_args(tiny_model(tiny_models, DIVIDES), tensor_parallel_size=2, enable_expert_parallel=True)
    decision, _ = launch.rewrite(args, Settings.from_environment())
    assert decision.rewrite
    assert "no NVIDIA driver answers" in decision.why


def test_the_log_has_one_table(tiny_models: Path, messages: list[str]) -> None:
    engine_config(tiny_model(tiny_models, ODD), data_parallel_size=2, enable_expert_parallel=True)
    assert len(messages) == 1
    for part in ("EP2TP=on", "patch: deepseek_v3", "--tensor-parallel-size", "+6.7% memory", "kernel: the faster one"):
        assert part in messages[0]


def test_the_log_has_one_line_where_nothing_changes(tiny_models: Path, messages: list[str]) -> None:
    engine_config(tiny_model(tiny_models, DIVIDES), tensor_parallel_size=2)
    assert len(messages) == 1
    assert "nothing to pad" in messages[0]
    assert "\n" not in messages[0]


def test_a_model_without_experts_is_left_alone(tmp_path: Path) -> None:
    dense = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}
    dense |= {"num_attention_heads": 4, "intermediate_size": 99, "vocab_size": 64, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    args = engine_args(tmp_path, data_parallel_size=2, enable_expert_parallel=True)
    decision, changes = launch.rewrite(args, Settings.from_environment())
    assert (decision.rewrite, changes, args.data_parallel_size) == (False, [], 2)
    assert "no routed experts" in decision.why


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    config = DIVIDES.config() | {"architectures": ["NewMoeForCausalLM"], "model_type": "new_moe"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = engine_args(tmp_path, tensor_parallel_size=2, enable_expert_parallel=True)
    with pytest.raises(PatchError, match=r"NewMoeForCausalLM.*EP2TP_PATCH_PATH"):
        launch.rewrite(args, Settings.from_environment())


def test_heads_that_do_not_divide_are_refused(tiny_models: Path) -> None:
    with pytest.raises(LaunchError, match=r"16 attention heads.*Sizes up to 3 that work: 1, 2"):
        engine_config(tiny_model(tiny_models, DIVIDES), data_parallel_size=3, enable_expert_parallel=True)


def test_processes_started_per_rank_are_refused(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    with pytest.raises(LaunchError, match="VLLM_DP_SIZE=2"):
        engine_config(tiny_model(tiny_models, DIVIDES), tensor_parallel_size=2, enable_expert_parallel=True)


def test_load_formats_that_bypass_the_stream_are_refused_where_padding_is_needed(tiny_models: Path) -> None:
    with pytest.raises(LaunchError, match="--load-format sharded_state is another"):
        engine_config(tiny_model(tiny_models, ODD), tensor_parallel_size=2, load_format="sharded_state")


def test_a_checkpoint_that_does_not_match_its_config_is_refused_before_workers_start(tmp_path: Path) -> None:
    model = ODD.write(tmp_path, "float32")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 77}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.*experts.*75.*moe_intermediate_size=77"):
        engine_config(model, tensor_parallel_size=2)


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DIVIDES.config() | {"num_experts_per_tok": 0}))
    args = engine_args(tmp_path, tensor_parallel_size=2, enable_expert_parallel=True)
    with pytest.raises(ModelError, match="num_experts_per_tok=0"):
        launch.rewrite(args, Settings.from_environment())


def test_registering_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from ep2tp.engines.vllm.plugin import register; register(); register(); "
        "print(sorted({'torch', 'vllm', 'transformers', 'pydantic', 'rich', 'numpy'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kernel", "whose"),
    [("engine", "the engine's (EP2TP_KERNEL=engine)"), ("auto", "the faster one"), ("ep2tp", "ep2tp's (EP2TP_KERNEL=")],
)
def test_the_log_says_whose_kernel_runs(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], kernel: str, whose: str
) -> None:
    monkeypatch.setenv("EP2TP_KERNEL", kernel)
    engine_config(tiny_model(tiny_models, ODD), data_parallel_size=2, enable_expert_parallel=True)
    assert f"kernel: {whose}" in messages[0]


@pytest.mark.parametrize(("mode", "whose"), [("on", "the faster one"), ("auto", "the engine's (EP2TP_KERNEL=auto;")])
def test_a_plain_launch_takes_the_kernel_where_ep2tp_was_asked_for(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], mode: str, whose: str
) -> None:
    monkeypatch.setenv("EP2TP", mode)
    engine_config(tiny_model(tiny_models, ODD), tensor_parallel_size=2)
    assert f"kernel: {whose}" in messages[0]


def test_an_engine_whose_seams_changed_is_left_alone_with_a_warning(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    changed = replace(seams.WEIGHTS, parameters=("self", "something_else"))
    monkeypatch.setattr(seams, "REQUIRED", (seams.SERVE, seams.ENGINE_CONFIG, changed))
    args = engine_args(tiny_model(tiny_models, DIVIDES), tensor_parallel_size=2, enable_expert_parallel=True)
    config = args.create_engine_config()
    assert config.parallel_config.enable_expert_parallel
    assert not guard.is_armed()
    assert len(messages) == 1
    assert "left the launch's parallelism as it is" in messages[0]
    assert "has changed where ep2tp touches it" in messages[0]
    monkeypatch.setenv("EP2TP_STRICT", "1")
    with pytest.raises(SeamError, match="get_all_weights"):
        args.create_engine_config()
    with pytest.raises(SeamError, match="get_all_weights"):
        engine_config(tiny_model(tiny_models, ODD), tensor_parallel_size=2)


def test_off_after_registration_changes_nothing(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP2TP", "off")
    config = engine_config(tiny_model(tiny_models, ODD), tensor_parallel_size=2, enable_expert_parallel=True)
    assert config.parallel_config.enable_expert_parallel
    assert config.model_config.hf_config.moe_intermediate_size == 75


def test_the_plan_travels_with_the_config_and_brings_the_weights_seam_along(tiny_models: Path) -> None:
    """A worker whose plugins are filtered out must still pad: unpickling its config wraps the seam."""
    config = engine_config(tiny_model(tiny_models, ODD), tensor_parallel_size=2)
    pickled = tiny_models / "hf_config.pickle"
    pickled.write_bytes(pickle.dumps(config.model_config.hf_config))
    code = (
        "import pickle, pathlib, sys, wrapt\n"
        "config = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "from vllm.model_executor.model_loader.default_loader import DefaultModelLoader\n"
        "print(config.ep2tp['ranks'], isinstance(vars(DefaultModelLoader)['get_all_weights'], wrapt.FunctionWrapper))"
    )
    env = os.environ | {"VLLM_PLUGINS": "none", "EP2TP": "off"}
    command = [sys.executable, "-c", code, str(pickled)]
    child = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert child.stdout.strip().splitlines()[-1] == "2 True"


def test_a_later_launch_of_the_same_process_is_not_guarded(tiny_models: Path) -> None:
    model = tiny_model(tiny_models, DIVIDES)
    engine_config(model, tensor_parallel_size=2, enable_expert_parallel=True)
    assert guard.is_armed()
    engine_config(model, tensor_parallel_size=2)
    assert not guard.is_armed()


def test_a_later_launch_with_ep2tp_off_is_not_guarded(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_models, DIVIDES)
    engine_config(model, tensor_parallel_size=2, enable_expert_parallel=True)
    monkeypatch.setenv("EP2TP", "off")
    engine_config(model, tensor_parallel_size=2)
    assert not guard.is_armed()


def test_a_second_config_of_the_same_arguments_is_still_of_a_rewritten_launch(tiny_models: Path) -> None:
    args = engine_args(tiny_model(tiny_models, DIVIDES), tensor_parallel_size=2, enable_expert_parallel=True)
    for _ in range(2):
        args.create_engine_config()
        assert guard.is_armed() and not args.enable_expert_parallel


def test_a_config_that_cannot_be_read_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs(model="no/such-model", tensor_parallel_size=2, enable_expert_parallel=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would be asked several times
    decision, changes = launch.rewrite(args, Settings.from_environment())
    assert (decision.is_warning, changes, args.enable_expert_parallel) == (True, [], True)
    assert "cannot be read" in decision.why
    monkeypatch.setenv("EP2TP_STRICT", "1")
    with pytest.raises(ModelError, match="cannot be read"):
        launch.rewrite(args, Settings.from_environment())


def quantised_config(folder: Path, quantization: dict[str, Any], **sizes: Any) -> Path:
    """A folder with a config alone, of a model that is never loaded."""
    config = DIVIDES.config() | sizes | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


UNKNOWN = {"quant_method": "auto-round", "bits": 4, "group_size": 128}


def test_formats_that_are_not_known_are_refused_where_a_slice_might_cut_a_group(tmp_path: Path) -> None:
    model = quantised_config(tmp_path, UNKNOWN, moe_intermediate_size=1408, intermediate_size=2048)
    options: dict[str, Any] = {"tensor_parallel_size": 2, "load_format": "dummy"}
    with pytest.raises(ModelError, match=r"routed weights are stored by auto-round.*cut a scale group"):
        planned(model, is_rewritten=True, **options)
    plan = planned(model, is_rewritten=False, **options)
    assert set(plan.unchecked) == {"routed", "shared"}
    assert not plan.is_padded


def test_formats_that_are_not_known_pass_where_slices_are_whole_groups(tmp_path: Path) -> None:
    model = quantised_config(tmp_path, UNKNOWN, moe_intermediate_size=2048, intermediate_size=2048)
    assert planned(model, is_rewritten=True, tensor_parallel_size=8).unchecked == {}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_data_parallelism_without_ep_slices_only_the_routed_experts_over_all_ranks(tmp_path: Path) -> None:
    model = quantised_config(tmp_path, FP8, moe_intermediate_size=1024, intermediate_size=10944)
    plan = planned(model, is_rewritten=False, data_parallel_size=4)
    assert plan.fields == {}
    assert {name: split.ranks for name, split in plan.splits.items()} == {"routed": 4, "shared": 1, "dense": 1}


def test_an_ep_only_backend_is_reset_in_the_kernel_config_too(tmp_path: Path) -> None:
    model = quantised_config(tmp_path, FP8, moe_intermediate_size=1536, intermediate_size=2048)
    args = engine_args(model, tensor_parallel_size=2, kernel_config={"moe_backend": "deep_gemm_mega_moe"})
    launch.rewrite(args, Settings.from_environment())
    assert args.kernel_config.moe_backend == "auto"


def test_a_drafts_settings_follow(tiny_models: Path) -> None:
    """vLLM refuses a draft on as many ranks as the launch had before it was folded."""
    given = {"method": "mtp", "draft_tensor_parallel_size": 2, "moe_backend": "deep-gemm-mega-moe"}
    args = engine_args(
        tiny_model(tiny_models, DIVIDES),
        tensor_parallel_size=2,
        data_parallel_size=2,
        enable_expert_parallel=True,
        speculative_config=given,
    )
    _, changes = launch.rewrite(args, Settings.from_environment())
    assert args.speculative_config == {"method": "mtp", "draft_tensor_parallel_size": 4}
    assert {c.setting.flags[0] for c in changes} >= {
        "--speculative-config.draft_tensor_parallel_size",
        "--speculative-config.moe_backend",
    }
    assert given["draft_tensor_parallel_size"] == 2, "the caller's own"
    args.speculative_config = {"method": "mtp", "draft_tensor_parallel_size": 1, "moe_backend": "triton"}
    args.enable_expert_parallel = True
    _, changes = launch.rewrite(args, Settings.from_environment())
    assert [c.setting.field for c in changes] == ["enable_expert_parallel"]


def test_a_speculators_draft_is_judged_by_the_model_that_is_served(tiny_models: Path, tmp_path: Path) -> None:
    """vLLM swaps the draft that is named for the model that it was made for."""
    model = tiny_model(tiny_models, DIVIDES)
    verifier = {"name_or_path": str(model), "architectures": ["DeepseekV3ForCausalLM"]}
    draft = {"architectures": ["Eagle3Speculator"], "speculators_config": {"verifier": verifier}}
    (tmp_path / "config.json").write_text(json.dumps(draft))
    args = engine_args(tmp_path, tensor_parallel_size=4, enable_expert_parallel=True)
    decision, _ = launch.rewrite(args, Settings.from_environment())
    assert decision.rewrite and not args.enable_expert_parallel


def test_whole_experts_are_not_padded_for_slices(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert-parallel launch that stays one: its shared experts are sliced, and share the routed ones' field."""
    monkeypatch.setenv("EP2TP", "auto")
    monkeypatch.setattr("ep2tp.engines.decision.links_of_job", lambda *_: Links(True, "all NVLink"))
    config = engine_config(tiny_model(tiny_models, ODD), tensor_parallel_size=4, enable_expert_parallel=True)
    assert config.parallel_config.enable_expert_parallel
    plan = padding.plan_of(config.model_config, Settings.from_environment())
    assert plan is not None
    # 2 x 80 over 4 ranks; slices of the routed experts, too, would need 96.
    assert plan.fields["moe_intermediate_size"] == (75, 80) == (75, config.model_config.hf_config.moe_intermediate_size)
    assert (plan.splits["routed"].ranks, plan.splits["shared"].ranks, plan.splits["dense"].ranks) == (1, 4, 4)


def test_gpus_of_other_processes_are_looked_at(tiny_models: Path, jobs: list[Any]) -> None:
    """One process a rank, each shown its own GPU, on a machine whose GPUs are all joined: left alone."""
    model = tiny_model(tiny_models, DIVIDES)
    for options in ({"data_parallel_rank": 3}, {"device_ids": [2, 3]}, {"data_parallel_external_lb": True}):
        args = engine_args(model, data_parallel_size=2, enable_expert_parallel=True, **options)
        assert not launch.rewrite(args, Settings.from_environment())[1]
    assert jobs == [(2, (), True), (2, (2, 3), False), (2, (), True)]


def test_node_by_node_data_parallelism_is_refused_with_the_launch_over_nodes(tiny_models: Path) -> None:
    args = engine_args(
        tiny_model(tiny_models, DIVIDES),
        data_parallel_size=4,
        data_parallel_size_local=2,
        data_parallel_address="10.0.0.1",
        enable_expert_parallel=True,
    )
    with pytest.raises(LaunchError, match="--tensor-parallel-size 4 --nnodes 2"):
        launch.rewrite(args, Settings.from_environment())


def planned(model: Path, is_rewritten: bool, **options: Any) -> Any:
    """The plan of a model, made from a config object like vLLM's with the stock parallel settings."""
    args = engine_args(model, **options)
    parallel = SimpleNamespace(
        tensor_parallel_size=args.tensor_parallel_size,
        data_parallel_size=args.data_parallel_size,
        prefill_context_parallel_size=1,
        enable_expert_parallel=False,
    )
    hf_config = SimpleNamespace(to_dict=dict, quantization_config=None)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(is_moe=True, hf_config=hf_config, model=str(model)),
        parallel_config=parallel,
        kernel_config=SimpleNamespace(moe_backend="auto"),
    )
    return padding.pad(vllm_config, args, Settings.from_environment(), is_rewritten)


def test_an_unknown_setting_stops_the_engine_with_the_allowed_values() -> None:
    code = "from ep2tp.engines.vllm.plugin import register; register()"
    env = os.environ | {"EP2TP": "maybe"}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert child.returncode == 1
    assert SettingError.__name__ in child.stderr
    assert "auto, on, off" in child.stderr
