"""Counts the collectives that parts of a model make in a running engine's worker, with torch's own profiler.

vLLM: pass :data:`EXTENSION` as ``worker_extension_cls``, then call the two methods through ``LLM.collective_rpc``; each
MoE layer is counted. SGLang: pass :data:`SGLANG_HOOK` in ``forward_hooks``; the whole decoder is counted, because a MoE
layer's all_reduce may happen at the border to the next layer. Works in eager mode, where a module's hooks run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

EXTENSION = "ep2tp.observe.collectives.CollectiveCounter"
SGLANG_HOOK = {
    "name": "ep2tp",
    "target_modules": ["model"],  # the decoder; the module around it is called without its hooks
    "hook_factory": "ep2tp.observe.collectives:count_in_sglang",
}

_RANGE = "ep2tp.counted"
_KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "recv",
    "reduce": "reduce",
}


class Counting:
    """One counting of the collectives in some modules, from its making until :meth:`stop`."""

    def __init__(self, modules: Iterable[Any]) -> None:
        """Mark the forward pass of each module, and start the profiler."""
        import torch

        self._open: list[Any] = []  # ranges of passes that have begun
        self._hooks = [handle for module in modules for handle in _mark(module, self._open)]
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profiler.start()

    def stop(self) -> dict[str, Any]:
        """Stop, and return this rank's counts.

        Returns:
            ``layers``: forward passes of the modules; ``inside``: collectives within them by kind; ``outside``: others.
        """
        while self._open:  # a pass may be at its end, in a hook that came before ours
            self._open.pop().__exit__(None, None, None)
        self._profiler.stop()
        for handle in self._hooks:
            handle.remove()
        events = self._profiler.events() or []
        inside: Counter[str] = Counter()
        outside: Counter[str] = Counter()
        for event in events:
            if kind := collective_kind(event.name):
                (inside if _is_inside(event) else outside)[kind] += 1
        layers = sum(event.name == _RANGE for event in events)
        return {"layers": layers, "inside": dict(inside), "outside": dict(outside)}


class CollectiveCounter:
    """Methods that vLLM adds to its worker class."""

    model_runner: Any

    def ep2tp_start_counting(self) -> None:
        """Start, with every MoE layer."""
        self._ep2tp_counting = Counting(_moe_layers(self.model_runner.model))

    def ep2tp_stop_counting(self) -> dict[str, Any]:
        """Stop, and return what :meth:`Counting.stop` does."""
        return self._ep2tp_counting.stop()


def count_in_sglang(config: Mapping[str, Any]) -> Callable[[Any, Any, Any], None]:
    """A module hook for SGLang's ``forward_hooks``.

    Args:
        config: ``folder`` gets ``rank-N.json``, what :meth:`Counting.stop` returned; ``passes``: of the model, to count
            after the first, which starts the counting.
    """
    passes, counting = 0, None

    def after_pass(decoder: Any, inputs: Any, output: Any) -> None:
        nonlocal passes, counting
        import torch.distributed as dist

        counting = counting or Counting([decoder])
        if passes == config["passes"]:
            rank = dist.get_rank() if dist.is_initialized() else 0
            Path(config["folder"], f"rank-{rank}.json").write_text(json.dumps(counting.stop()))
        passes += 1

    return after_pass


def collective_kind(operator: str) -> str | None:
    """The kind of collective that a profiled operator is, or None.

    Counted are torch.distributed's operators (``c10d::``) and vLLM's shared-memory ones on CPU (``_C::shm_``): below
    the operators that engines wrap around them, so that none is counted twice.
    """
    namespace, _, name = operator.partition("::")
    if namespace == "_C" and name.startswith("shm_"):
        name = name.removeprefix("shm_")
    elif namespace != "c10d":
        return None
    name = name.strip("_")
    return next((kind for prefix, kind in _KINDS.items() if name.startswith(prefix)), None)


def _moe_layers(model: Any) -> Iterator[Any]:
    """The modules that own experts: the parents of the outermost modules with a ``moe_config``."""
    modules = dict(model.named_modules())
    experts = [name for name, module in modules.items() if hasattr(module, "moe_config")]
    outermost = [name for name in experts if not any(name.startswith(f"{other}.") for other in experts)]
    for name in outermost:
        yield modules[name.rpartition(".")[0]]


def _mark(layer: Any, open_ranges: list[Any]) -> list[Any]:
    import torch

    def enter(module: Any, inputs: Any) -> None:
        record = torch.profiler.record_function(_RANGE)
        record.__enter__()
        open_ranges.append(record)

    def leave(module: Any, inputs: Any, output: Any) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def _is_inside(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name == _RANGE:
            return True
        parent = parent.cpu_parent
    return False
