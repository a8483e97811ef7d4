"""What one rank of a running vLLM engine looks like from inside: a ``worker_extension_cls``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

_WEIGHTS = ("w13_weight", "w2_weight", "gate_up_proj.weight", "down_proj.weight")


class WorkerProbe:
    """Adds one call to vLLM's worker."""

    rank: int
    device: Any
    model_runner: Any

    def describe_rank(self) -> dict[str, Any]:
        """Libraries mapped, parallelism of the MoE layers, shapes of the MLP weights; JSON-able."""
        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as loaders

        from ep2tp.rewrite import guard

        model = self.model_runner.get_model()
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "read_bytes": _bytes_from_disk(),
            "device": str(self.device),
            "backend": str(dist.get_backend()) if dist.is_initialized() else None,
            "expert_parallel_libraries": guard.mapped_libraries(),
            "nvshmem_of_torch": _mapped("nvshmem"),
            "guarded_modules": [name for name in guard.GUARDED if sys.modules.get(name) is not None],
            "guard_is_armed": guard.is_armed(),
            "plugin_was_loaded": "ep2tp" in loaders,
            "moe": sorted({_parallelism(m.moe_config) for _, m in model.named_modules() if hasattr(m, "moe_config")}),
            "shapes": {n: list(p.shape) for n, p in model.named_parameters() if n.endswith(_WEIGHTS)},
        }


def _parallelism(moe_config: Any) -> str:
    parallel = moe_config.moe_parallel_config
    return f"use_ep={parallel.use_ep} tp={parallel.tp_size} ep={parallel.ep_size} dp={parallel.dp_size}"


def _bytes_from_disk() -> int:
    """What this process has read from disk so far, by the kernel's count, page faults included."""
    [line] = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes:")]
    return int(line.split()[1])


def _mapped(part: str) -> list[str]:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return sorted({line.split()[-1] for line in maps.splitlines() if part in line.lower()})
