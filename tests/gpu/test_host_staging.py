"""The collectives by which two ranks share one GPU in these tests; checked on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist
from host_staging import HostStaging


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = HostStaging()
    group.cpu_group, group.world_size, group.rank_in_group, group.ranks = dist.group.WORLD, 2, rank, [0, 1]
    mine = (torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 0.25) * (1 + rank)
    before, both = mine.clone(), [(torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 0.25) * (1 + r) for r in (0, 1)]
    assert torch.equal(group.all_reduce(mine), both[0] + both[1])
    assert torch.equal(mine, before)
    count = torch.tensor([2**40 + rank])
    assert group.all_reduce(count).tolist() == [2**41 + 1]
    assert count.tolist() == [2**40 + rank]
    assert torch.equal(group.all_gather(mine.T), torch.cat([b.T for b in both], dim=-1))
    assert torch.equal(group.all_gather(mine, 0), torch.cat(both, dim=0))
    gathered = group.gather(mine, dst=1)
    assert (gathered is None) == (rank == 0)
    assert torch.equal(group.broadcast(mine, src=1), both[1])
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
