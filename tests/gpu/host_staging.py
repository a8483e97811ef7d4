"""Collectives over tensors of one shared GPU, by way of host memory and gloo. Knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# For vLLM, before it starts its workers: no NCCL communicator, no symmetric memory, no network but the loopback.
ENVIRONMENT = {
    "VLLM_DISABLE_PYNCCL": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class HostStaging:
    """Overrides the collectives of a vLLM device communicator; the other class of the two sets the attributes."""

    cpu_group: ProcessGroup
    world_size: int
    rank_in_group: int
    ranks: list[int]

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks: added in F32, rounded once, as NCCL does for two ranks."""
        wide = torch.float32 if input_.is_floating_point() else input_.dtype
        host = input_.to("cpu", wide)
        host = host.clone() if host is input_ else host
        dist.all_reduce(host, group=self.cpu_group)
        return host.to(input_.device, input_.dtype)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The ranks' tensors, one after the other along ``dim``."""
        host = _bytes(input_)
        parts = [torch.empty_like(host) for _ in range(self.world_size)]
        dist.all_gather(parts, host, group=self.cpu_group)
        return torch.cat([_values(part, input_) for part in parts], dim=dim)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """:meth:`all_gather`, returned on rank ``dst`` of the group alone."""
        gathered = self.all_gather(input_, dim)
        return gathered if self.rank_in_group == dst else None

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrite ``tensor`` with that of rank ``src`` of the group."""
        if self.world_size > 1:
            host = _bytes(tensor)
            dist.broadcast(host, self.ranks[src], self.cpu_group)
            tensor.copy_(_values(host, tensor))
        return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu").contiguous().flatten().clone().view(torch.uint8)


def _values(host: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return host.view(like.dtype).view(like.shape).to(like.device)
