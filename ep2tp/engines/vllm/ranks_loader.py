"""vLLM's ``--load-format ep2tp``: each rank reads its own slices of the experts, and what all ranks share."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ep2tp.engines.rank_files import RankFiles
from ep2tp.errors import LaunchError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = logging.getLogger("vllm.ep2tp")


@register_model_loader("ep2tp")
class RanksLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads what ``ep2tp reshard --layout ranks`` wrote."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: the checkpoint is a folder."""

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield the shared tensors, then this rank's slices as whole-sized views.

        Raises:
            CheckpointError: the folder is no finished conversion for rank files.
            LaunchError: the launch does not slice experts over as many ranks as the files do.
        """
        self.counter_before_loading_weights = time.perf_counter()  # vLLM logs the time from here on
        files = RankFiles(Path(model_config.model))
        rank = _rank_of(model, files)
        yield from files.weights(rank)
        logger.info("ep2tp: rank %d of %d read %.3f GB", rank, files.ranks, files.bytes_read / 1e9)


def _rank_of(model: torch.nn.Module, files: RankFiles) -> int:
    """The rank of this process among those that slice experts."""
    found = set()
    for module in model.modules():
        parallel = getattr(getattr(module, "moe_config", None), "moe_parallel_config", None)
        if parallel is not None:
            found.add((parallel.tp_size, parallel.tp_rank, parallel.ep_size))
    if len(found) != 1 or (size := found.pop())[0] != files.ranks or size[2] != 1:
        raise LaunchError(
            f"{files.folder}: holds experts in {files.ranks} slices; start with --tensor-parallel-size {files.ranks} "
            "and without expert parallelism, or convert the checkpoint again for this launch"
        )
    return int(size[1])
