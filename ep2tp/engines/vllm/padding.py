"""Plans the weights of a vLLM model, and grows the sizes in its configs where slices would cut a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ep2tp.engines import padding
from ep2tp.engines.vllm import experts, seams
from ep2tp.engines.vllm.launch import let_ray_copy_our_variables, seam_problem
from ep2tp.engines.vllm.model_config import resolved_config
from ep2tp.errors import LaunchError, SeamError
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import ClassName
from ep2tp.model.same import is_same_model
from ep2tp.model.sharding import ShardPlan, plan_shards
from ep2tp.settings import Settings

_NOTE = "ep2tp"  # attribute of hf_config by which a worker finds the plan
_STREAMED = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "dummy"})


class PlanNote(dict[str, Any]):
    """What a worker needs to make the plan again. Being unpickled, it makes sure that the worker pads.

    A worker without ep2tp cannot unpickle it and stops there, instead of loading unpadded weights into padded layers;
    one whose plugins were filtered, or in which EP2TP is off, still gets the seams that pad.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the name of :func:`_restore_note`."""
        return _restore_note, (dict(self),)


def pad(vllm_config: Any, arguments: Any, settings: Settings, is_rewritten: bool) -> ShardPlan | None:
    """Plan the weights of a model with experts, and grow the sizes in its configs where slices would cut a block.

    Returns:
        The plan; None, unless the launch was rewritten, for a model that no patch matches or whose config ep2tp cannot
        read: nothing is then changed.

    Raises:
        ModelError, CheckpointError: the model or its checkpoint does not match its config, or cannot be sliced.
        LaunchError: padding is needed, and the load format does not stream its weights through vLLM's default loader.
    """
    model_config = vllm_config.model_config
    config = resolved_config(arguments, model_config.hf_config)
    facts = padding.facts_of_launch(config, str(arguments.model), settings, is_rewritten)
    if facts is None:
        return None
    plan = _plan(facts, vllm_config)
    if is_rewritten:
        padding.refuse_unchecked(plan)
    if plan.is_padded:
        _refuse_unpaddable(plan, vllm_config, settings)
        padding.check_local_files(Path(model_config.model), vllm_config.load_config.load_format, plan)
        _grow(vllm_config, plan)
        let_ray_copy_our_variables()
    return plan


def plan_of(model_config: Any, settings: Settings) -> ShardPlan | None:
    """The plan by which a worker's model was built, from the note in its config; None where nothing is padded.

    Raises:
        PatchError: this worker does not have the patch that the launch used.
    """
    note = getattr(model_config.hf_config, _NOTE, None)
    return None if note is None else padding.plan_of_note(note, settings)


def _restore_note(note: dict[str, Any]) -> PlanNote:
    from ep2tp.engines.vllm.plugin import load_model, pad_weights

    seams.WEIGHTS.wrap(pad_weights)
    seams.LOADED.wrap(load_model)
    return PlanNote(note)


def _plan(facts: ModelFacts, vllm_config: Any) -> ShardPlan:
    parallel = vllm_config.parallel_config
    dense_ranks = parallel.tensor_parallel_size
    ranks = dense_ranks * parallel.prefill_context_parallel_size * parallel.data_parallel_size
    if parallel.enable_expert_parallel and ranks > 1:
        kept: dict[ClassName, str] = {"routed": "whole experts on each rank"}
        return plan_shards(facts, ranks, kept, dense_ranks, routed_ranks=1)
    handled = experts.left_to_engine(facts, ranks, vllm_config.kernel_config.moe_backend)
    return plan_shards(facts, ranks, handled, dense_ranks)


def _refuse_unpaddable(plan: ShardPlan, vllm_config: Any, settings: Settings) -> None:
    needs = padding.needs_padding(plan)
    load_format = vllm_config.load_config.load_format
    if load_format not in _STREAMED:
        raise LaunchError(
            f"{needs}, which ep2tp does as weights stream from safetensors or PyTorch files through vLLM's default "
            f"loader; --load-format {load_format} is another. Use --load-format auto, or a size that divides"
        )
    if problem := seam_problem(settings):
        raise SeamError(f"{needs}, but {problem}. Use a tensor-parallel size that divides, or EP2TP=off")


def _grow(vllm_config: Any, plan: ShardPlan) -> None:
    """Write the padded sizes into the target's and an MTP draft's config; workers get copies of both."""
    target = vllm_config.model_config
    note = PlanNote(padding.note_of(plan, vllm_config.parallel_config.tensor_parallel_size))
    models = [target]
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is not None and draft is not target and is_same_model(draft.model, target.model):
        models.append(draft)
    for model in models:
        padding.grow([model.hf_config, model.hf_text_config], plan, "vLLM")
        setattr(model.hf_config, _NOTE, note)
