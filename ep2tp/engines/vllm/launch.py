"""One vLLM launch: decide, rewrite its arguments, pad the sizes in its configs, and remember what to report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.reader import check_folder
from ep2tp.engines import seams as engine_seams
from ep2tp.engines.decision import Decision, decide
from ep2tp.engines.vllm import arguments as vllm_arguments
from ep2tp.engines.vllm import experts, seams
from ep2tp.errors import LaunchError, ModelError, SeamError
from ep2tp.model.facts import is_moe, read_facts
from ep2tp.model.families import ClassName, find_family, load_families
from ep2tp.model.locate import facts_of
from ep2tp.model.sharding import ShardPlan, plan_shards
from ep2tp.rewrite import guard
from ep2tp.rewrite.parallel_plan import Change, Limits, assumes_expert_parallelism, to_tensor_parallel
from ep2tp.settings import Mode, Settings

NOTE = "ep2tp"  # attribute of hf_config by which a worker finds the plan
_STREAMED = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "dummy"})
_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


def rewrite(arguments: Any, settings: Settings) -> tuple[Decision, list[Change]]:
    """Rewrite an ``EngineArgs``, or the Namespace of ``vllm serve``, in place where it assumes expert parallelism.

    Raises:
        LaunchError: the launch cannot become tensor parallel; the message names one that can.
        PatchError: no patch matches the model, so its weights could not be checked.
        SeamError: ``EP2TP_STRICT=1`` and this vLLM has changed where ep2tp touches it.
    """
    from vllm.engine.arg_utils import EngineArgs

    values = vllm_arguments.given_values(arguments, EngineArgs)
    trigger = assumes_expert_parallelism(vllm_arguments.RULES, values)
    decision = decide(settings.mode, trigger, _gpus(arguments))
    if not decision.rewrite:
        return decision, []
    config = read_model_config(arguments)
    if config is None or not is_moe(config):
        return decision.leave_alone(f"{arguments.model} has no routed experts"), []
    if problem := seam_problem(settings):
        return decision.leave_alone(problem, is_warning=True), []
    if os.environ.get("VLLM_DP_SIZE", "1") != "1":
        raise LaunchError(
            f"VLLM_DP_SIZE={os.environ['VLLM_DP_SIZE']} starts one process per data-parallel rank; tensor parallelism "
            "is one launch over all GPUs. Unset it and start once with the product as --tensor-parallel-size"
        )
    facts = facts_of(config, arguments.model, load_families(settings.patches, settings.patch_path))
    changes = to_tensor_parallel(vllm_arguments.RULES, values, Limits(facts.heads, facts.kv_heads, facts.vocabulary))
    vllm_arguments.apply(changes, arguments, EngineArgs)
    guard.arm()
    _let_ray_copy_our_variables()
    return decision, changes


def pad(vllm_config: Any, arguments: Any, settings: Settings) -> ShardPlan | None:
    """Plan the weights of an MoE model, and grow the sizes in its configs where slices would cut a block.

    Returns:
        The plan; None for a model without routed experts, or one that no patch matches.

    Raises:
        ModelError, CheckpointError: the model or its checkpoint does not match its config.
        LaunchError: padding is needed, and the load format does not stream its weights through vLLM's default loader.
    """
    model_config = vllm_config.model_config
    config = read_model_config(arguments) if model_config.is_moe else None
    if config is None or not is_moe(config):
        return None
    if "quantization_config" not in config and (quant := getattr(model_config.hf_config, "quantization_config", None)):
        config["quantization_config"] = quant  # vLLM reads it from hf_quant_config.json
    families = load_families(settings.patches, settings.patch_path)
    if find_family(config, families) is None:
        return None
    facts = facts_of(config, str(arguments.model), families)
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
    if parallel.enable_expert_parallel:
        handled: dict[ClassName, str] = {"routed": "whole experts on each rank"}
    else:
        ranks *= parallel.data_parallel_size
        handled = experts.left_to_engine(facts, ranks, getattr(arguments, "moe_backend", "auto"))
    plan = plan_shards(facts, ranks, handled)
    if plan.is_padded:
        _refuse_unpaddable(plan, vllm_config, settings)
        folder = Path(model_config.model)
        if folder.is_dir() and vllm_config.load_config.load_format != "dummy":
            check_folder(folder, plan)
        _grow(vllm_config, plan)
    return plan


def plan_of(model_config: Any, settings: Settings) -> ShardPlan | None:
    """The plan by which a worker's model was built, from the note in its config; None where nothing is padded."""
    note = getattr(model_config.hf_config, NOTE, None)
    if note is None:
        return None
    family = load_families(settings.patches, settings.patch_path)[note["family"]]
    facts = read_facts(note["config"], family, note["matched_by"], note["source"])
    return plan_shards(facts, note["ranks"], note["left_to_engine"])


def seam_problem(settings: Settings) -> str | None:
    """Why this vLLM is left alone, or None: its version is known (or the user insists), and every seam holds.

    Raises:
        SeamError: ``EP2TP_STRICT=1``, and there is a problem.
    """
    from vllm import __version__ as version

    insists = settings.mode is Mode.ON
    return engine_seams.problem("vLLM", version, seams.VERSIONS, seams.ALL, settings.strict, insists)


def read_model_config(arguments: Any) -> dict[str, Any] | None:
    """The model's config.json as a dict, with the user's ``hf_overrides``; None where the model has none."""
    from transformers import PretrainedConfig

    source = getattr(arguments, "hf_config_path", None) or arguments.model
    try:
        config, _ = PretrainedConfig.get_config_dict(source, revision=arguments.revision)
    except OSError:
        return None
    overrides = getattr(arguments, "hf_overrides", None)
    return _merged(config, overrides) if isinstance(overrides, Mapping) else dict(config)


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _gpus(arguments: Any) -> int:
    sizes = ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
    gpus = 1
    for size in sizes:
        gpus *= getattr(arguments, size, None) or 1
    return gpus


def _refuse_unpaddable(plan: ShardPlan, vllm_config: Any, settings: Settings) -> None:
    sizes = ", ".join(f"{field} {before} -> {after}" for field, (before, after) in plan.fields.items())
    load_format = str(getattr(vllm_config.load_config.load_format, "value", vllm_config.load_config.load_format))
    if load_format not in _STREAMED:
        raise LaunchError(
            f"{plan.facts.source} needs padding over {plan.ranks} ranks ({sizes}), which ep2tp does as weights stream "
            f"through vLLM's default loader; --load-format {load_format} bypasses it. Use --load-format auto"
        )
    if problem := seam_problem(settings):
        raise SeamError(f"{plan.facts.source} needs padding over {plan.ranks} ranks ({sizes}), but {problem}")


def _grow(vllm_config: Any, plan: ShardPlan) -> None:
    """Write the padded sizes into the target's and an MTP draft's config; workers get copies of both."""
    target = vllm_config.model_config
    note = {
        "family": plan.facts.family.name,
        "matched_by": plan.facts.matched_by,
        "source": plan.facts.source,
        "config": dict(plan.facts.config),
        "ranks": plan.ranks,
        "left_to_engine": dict(plan.left_to_engine),
    }
    models = [target]
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is not None and draft is not target and draft.model == target.model:
        models.append(draft)
    for model in models:
        for field, (before, after) in plan.fields.items():
            _grow_field(model, field, before, after)
        setattr(model.hf_config, NOTE, note)


def _grow_field(model_config: Any, field: str, before: int, after: int) -> None:
    configs = [model_config.hf_config, model_config.hf_text_config]
    if not any(getattr(config, field, None) in (before, after) for config in configs):
        raise ModelError(
            f"{model_config.model}: vLLM's config object has no {field}={before}, which config.json has; "
            "this vLLM reads the size from elsewhere"
        )
    for config in configs:
        if getattr(config, field, None) == before:
            setattr(config, field, after)


def _let_ray_copy_our_variables() -> None:
    """vLLM's Ray executor passes on only the variables it is told of."""
    prefixes = [p for p in os.environ.get(_RAY_PREFIXES, "").split(",") if p]
    if "EP2TP" not in prefixes:
        os.environ[_RAY_PREFIXES] = ",".join([*prefixes, "EP2TP"])
