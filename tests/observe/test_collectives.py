from __future__ import annotations

import pytest

from ep2tp.observe.collectives import collective_kind


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("c10d::allreduce_", "all_reduce"),
        ("c10d::alltoall_base_", "all_to_all"),
        ("c10d::_allgather_base_", "all_gather"),
        ("c10d::allgather_into_tensor_coalesced_", "all_gather"),
        ("c10d::_reduce_scatter_base_", "reduce_scatter"),
        ("c10d::reduce_", "reduce"),
        ("c10d::send", "send"),
        ("_C::shm_allreduce", "all_reduce"),
        ("_C::shm_all_gather", "all_gather"),
        ("vllm::all_reduce", None),  # wraps one of the above
        ("aten::add", None),
        ("c10d::barrier", None),
    ],
)
def test_kinds(operator: str, kind: str | None) -> None:
    assert collective_kind(operator) == kind
