"""Rank files in SGLang: where the model's folder holds them, each rank reads its own slices. No flag is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep2tp.engines.rank_files import RankFiles
from ep2tp.engines.sglang.experts import moe_layers
from ep2tp.errors import LaunchError
from ep2tp.model.families import load_families
from ep2tp.model.locate import find_facts
from ep2tp.settings import Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("sglang.ep2tp")


def rank_weights(folder: Path, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the shared tensors, then this rank's slices as whole-sized views.

    Raises:
        CheckpointError: the folder is no finished conversion for rank files.
        LaunchError: the launch does not slice experts as the files do.
    """
    files = RankFiles(folder)
    rank = _rank_of(model, files)
    yield from files.weights(rank)
    logger.info("ep2tp: rank %d of %d read %.3f GB", rank, files.ranks, files.bytes_read / 1e9)


def _rank_of(model: Any, files: RankFiles) -> int:
    """The rank of this process among those that slice experts.

    Some runners round a slice up, and then read past the slice of this rank, where a view holds nothing.
    """
    families = load_families(folders=Settings.from_environment().patch_path)
    routed = find_facts(str(files.folder), families).tensor_class("routed")
    per_rank = routed.size // files.ranks if routed else 0
    layers = [layer for _, layer in moe_layers(model)]
    found = {(m.moe_tp_size, m.moe_tp_rank, m.moe_ep_size, m.intermediate_size_per_partition) for m in layers}
    if len(found) != 1 or (layer := found.pop())[0] != files.ranks or layer[2:] != (1, per_rank):
        raise LaunchError(
            f"{files.folder}: holds experts in {files.ranks} slices of {per_rank}; start with --tp-size {files.ranks}, "
            "without expert parallelism, and with a --moe-runner-backend that does not round a slice up (triton), or "
            "convert the checkpoint again for this launch"
        )
    return int(layer[1])
