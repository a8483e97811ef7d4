"""Plans the weights of an SGLang launch, and tells its workers, which read the model's config for themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ep2tp.engines import padding
from ep2tp.engines.sglang import experts
from ep2tp.engines.sglang.launch import read_config, resolved, seam_problem
from ep2tp.errors import LaunchError, SeamError
from ep2tp.model.sharding import ShardPlan, plan_shards
from ep2tp.settings import Settings

_STREAMED = frozenset({"auto", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "layered", "dummy"})


def plan(arguments: Any, settings: Settings, is_rewritten: bool) -> ShardPlan | None:
    """Plan the weights of a resolved ``ServerArgs`` whose model has experts.

    Returns:
        The plan. None, unless the launch was rewritten, for a launch with expert parallelism, which slices no expert,
        and for a model that no patch matches or whose config ep2tp cannot read.

    Raises:
        ModelError, CheckpointError: the model or its checkpoint does not match its config, or cannot be sliced.
        LaunchError: padding is needed, and the weights do not stream through SGLang's default loader.
    """
    view = resolved(arguments)
    config = read_config(arguments)
    if config is None or view.ep_size > 1:
        return None
    facts = padding.facts_of_launch(config, str(arguments.model_path), settings, is_rewritten)
    if facts is None:
        return None
    ranks = view.tp_size // (view.moe_dp_size or 1)
    handled = experts.left_to_engine(facts, ranks, view.device)
    # What a kernel would like is no reason to refuse weights that cannot be padded.
    kernel = experts.multiples(facts) if _streams(view) and not experts.pads_itself(view.device) else {}
    found = plan_shards(facts, ranks, handled, view.tp_size, kernel)
    if is_rewritten:
        experts.refuse_expert_parallel_only(view.quantization, view.moe_runner_backend, facts.source)
        padding.refuse_unchecked(found)
    if is_rewritten or found.is_padded:
        experts.refuse_wrong_in_sglang(facts, ranks, view.quantization, view.device)
    if found.is_padded:
        _refuse_unpaddable(found, view, settings)
        padding.check_local_files(Path(str(arguments.model_path)), str(view.load_format), found)
    return found


def _streams(view: Any) -> bool:
    return str(view.load_format) in _STREAMED and _weight_load_mode(view) == "serial"


def _weight_load_mode(view: Any) -> str:
    return str(getattr(view, "startup_weight_load_mode", "serial"))  # since 0.5.19


def _refuse_unpaddable(found: ShardPlan, view: Any, settings: Settings) -> None:
    needs = padding.needs_padding(found)
    how = f"{needs}, which ep2tp does as weights stream from their files through SGLang's default loader; "
    if str(view.load_format) not in _STREAMED:
        raise LaunchError(
            f"{how}--load-format {view.load_format} is another. Use --load-format auto, or a size that divides"
        )
    if (mode := _weight_load_mode(view)) != "serial":
        raise LaunchError(f"{how}--startup-weight-load-mode {mode} is another way. Use serial")
    if problem := seam_problem(settings):
        raise SeamError(f"{needs}, but {problem}. Use a tensor-parallel size that divides, or EP2TP=off")
