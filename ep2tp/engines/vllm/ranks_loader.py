"""vLLM's ``--load-format ep2tp``: each rank reads its own slices of the experts, and what all ranks share.

vLLM's expert loader takes whole tensors and copies rank r's slice out of them. The rank files hold slices. So each
slice is read into memory where it lies at rank r's place of a view as large as the whole tensor: for columns the view's
rows overlap, for rows the memory around the slice is reserved but never touched. The rest of the view means nothing,
and vLLM does not keep it: every expert loader that slices by rank, fused or not, copies exactly the slice.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ep2tp.checkpoint.conversion import CUTS, SHARED, rank_folder
from ep2tp.checkpoint.header import StoredTensor
from ep2tp.checkpoint.journal import MANIFEST
from ep2tp.checkpoint.reader import read_header
from ep2tp.errors import CheckpointError, LaunchError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = logging.getLogger("vllm.ep2tp")

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@register_model_loader("ep2tp")
class RanksLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads what ``ep2tp reshard --layout ranks`` wrote.

    Attributes:
        bytes_read: bytes of tensors that this rank has read.
    """

    bytes_read = 0

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
        folder = Path(model_config.model)
        self.counter_before_loading_weights = time.perf_counter()  # vLLM logs the time from here on
        ranks = _ranks_of(folder)
        rank = _rank_of(model, ranks, folder)
        for file in sorted((folder / SHARED).glob("*.safetensors")):
            yield from self._read(file, 0, 1)
        for file in sorted((folder / rank_folder(rank, ranks)).glob("*.safetensors")):
            yield from self._read(file, rank, ranks)
        logger.info("ep2tp: rank %d of %d read %.3f GB", rank, ranks, self.bytes_read / 1e9)

    def _read(self, path: Path, rank: int, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
        header = read_header(path)
        cuts = json.loads(header.metadata.get(CUTS, "{}"))
        with path.open("rb", buffering=0) as file:
            for tensor in header.tensors:
                axis, parts = cuts.get(tensor.name, (0, 1))
                self.bytes_read += tensor.size
                yield tensor.name, read_slice(file.fileno(), tensor, axis, parts, rank, ranks)


def read_slice(file: int, tensor: StoredTensor, axis: int, parts: int, rank: int, ranks: int) -> torch.Tensor:
    """Read one rank's slice as a view of the whole tensor's size, in which only that slice means anything.

    Args:
        file: descriptor of the open file.
        tensor: the slice as stored.
        axis: the sliced axis.
        parts: matrices that lie one after the other on the axis (2 for gate and up as halves).
        rank, ranks: whose slice it is.
    """
    dtype = _DTYPES[tensor.dtype]
    outer, inner = prod(tensor.shape[:axis]), prod(tensor.shape[axis + 1 :])
    width = tensor.shape[axis] // parts if tensor.shape else 1
    shape = (*tensor.shape[:axis], ranks * parts * width, *tensor.shape[axis + 1 :]) if tensor.shape else ()
    if parts == 1 or ranks == 1:
        width *= parts
        # Element (o, j, i) of the whole lies at (o*width + j)*inner + i: rank r's slice is then contiguous from
        # r*width*inner on.
        lead = rank * width * inner
        memory = torch.empty(outer * width * inner + (ranks - 1) * width * inner, dtype=dtype)
        _read_into(file, tensor, memory[lead : lead + outer * width * inner])
        return memory.as_strided(shape, _strides(tensor.shape))
    slices = torch.empty(outer, parts, width, inner, dtype=dtype)
    _read_into(file, tensor, slices)
    whole = torch.empty(outer, parts, ranks * width, inner, dtype=dtype)
    whole.narrow(2, rank * width, width).copy_(slices)
    return whole.view(shape)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _read_into(file: int, tensor: StoredTensor, memory: torch.Tensor) -> None:
    view = memoryview(memory.view(-1).view(torch.uint8).numpy())
    done = 0
    while done < tensor.size:
        count = os.preadv(file, [view[done:]], tensor.offset + done)
        if count == 0:
            raise CheckpointError(f"{tensor.file}: {tensor.name}: the file ends within its data; it was cut off")
        done += count


def _ranks_of(folder: Path) -> int:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        layout, ranks = manifest["layout"], int(manifest["ranks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {error}; --load-format ep2tp reads what 'ep2tp reshard --layout ranks' has finished"
        ) from None
    if layout != "ranks":
        raise CheckpointError(f"{path}: layout {layout!r}; leave out --load-format ep2tp, any engine reads this one")
    return ranks


def _rank_of(model: torch.nn.Module, ranks: int, folder: Path) -> int:
    """The rank of this process among those that slice experts."""
    found = set()
    for module in model.modules():
        parallel = getattr(getattr(module, "moe_config", None), "moe_parallel_config", None)
        if parallel is not None:
            found.add((parallel.tp_size, parallel.tp_rank, parallel.ep_size))
    if len(found) != 1 or (size := found.pop())[0] != ranks or size[2] != 1:
        raise LaunchError(
            f"{folder}: holds experts in {ranks} slices; start with --tensor-parallel-size {ranks} and without expert "
            "parallelism, or convert the checkpoint again for this launch"
        )
    return int(size[1])
