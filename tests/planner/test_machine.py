"""Which GPU and link a plan is for."""

from __future__ import annotations

import pytest

from ep2tp.errors import SettingError
from ep2tp.planner.gpus import find_gpu, unknown_gpu
from ep2tp.planner.machine import choose_gpu


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("h100", "H100"),
        ("rtx pro 6000", "RTX PRO 6000"),
        ("RTXPRO6000", "RTX PRO 6000"),
        ("5090", "RTX 5090"),
        ("A6000", "RTX A6000"),
        ("NVIDIA H200 NVL", "H200"),
    ],
)
def test_names_as_the_driver_and_as_people_write_them(reported: str, name: str) -> None:
    assert find_gpu(reported).name == name


@pytest.mark.parametrize("name", ["", "TPU v5", "MI300X", "L40", "L20", "A10", "GH200", "GB200", "H2", "RTX 409"])
def test_another_gpu_needs_its_memory(name: str) -> None:
    """``L40`` is no part of L40S, and L4 none of it: each is a GPU of its own."""
    with pytest.raises(SettingError, match="for another GPU give --memory GB"):
        choose_gpu(name, None)
    found = choose_gpu(name, 192.0)
    assert (found.name, found.memory_gb) == (name, 192)
    assert "assumed" in found.source


@pytest.mark.parametrize("name", ["A100", "RTX", "RTX 6000", "A100 PCIe"])
def test_a_name_of_several_is_refused_with_their_names(name: str) -> None:
    for memory in (None, 80.0):
        with pytest.raises(SettingError, match=r" or .*: write one of them"):
            choose_gpu(name, memory)


def test_memory_may_be_given_with_and_without_a_name() -> None:
    assert choose_gpu("H100", 40.0).memory_gb == 40
    assert choose_gpu("H100", 40.0).bandwidth == find_gpu("H100").bandwidth
    assert "assumed" in unknown_gpu(48).source
    assert choose_gpu(None, 48.0) == unknown_gpu(48)
