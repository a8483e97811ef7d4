"""Counts the collectives that each MoE layer of a running vLLM worker makes, with torch's own profiler.

Pass :data:`EXTENSION` as ``worker_extension_cls``, then call the two methods through ``LLM.collective_rpc``. Works in
eager mode, where a layer's module hooks run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

EXTENSION = "ep2tp.observe.collectives.CollectiveCounter"

_RANGE = "ep2tp.moe_layer"
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


class CollectiveCounter:
    """Methods that vLLM adds to its worker class."""

    model_runner: Any

    def ep2tp_start_counting(self) -> None:
        """Mark every MoE layer's forward pass, and start the profiler."""
        import torch

        self._ep2tp_hooks = [handle for layer in _moe_layers(self.model_runner.model) for handle in _mark(layer)]
        self._ep2tp_profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._ep2tp_profiler.start()

    def ep2tp_stop_counting(self) -> dict[str, Any]:
        """Stop, and return this rank's counts.

        Returns:
            ``layers``: forward passes of MoE layers; ``inside``: collectives within them by kind; ``outside``: others.
        """
        self._ep2tp_profiler.stop()
        for handle in self._ep2tp_hooks:
            handle.remove()
        events = self._ep2tp_profiler.events() or []
        inside: Counter[str] = Counter()
        outside: Counter[str] = Counter()
        for event in events:
            if kind := collective_kind(event.name):
                (inside if _is_inside(event) else outside)[kind] += 1
        layers = sum(event.name == _RANGE for event in events)
        return {"layers": layers, "inside": dict(inside), "outside": dict(outside)}


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


def _mark(layer: Any) -> list[Any]:
    import torch

    open_ranges: list[Any] = []

    def enter(module: Any, inputs: Any) -> None:
        record = torch.profiler.record_function(_RANGE)
        record.__enter__()
        open_ranges.append(record)

    def leave(module: Any, inputs: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def _is_inside(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name == _RANGE:
            return True
        parent = parent.cpu_parent
    return False
