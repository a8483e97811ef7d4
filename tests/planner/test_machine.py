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
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA A10", "A10"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("RTX 4090 24 GB", "RTX 4090"),
        ("L40S 48GB", "L40S"),
        ("Tesla L4 24GB PCIe", "L4"),
        ("H200 141GB", "H200"),
        ("H100 SXM5 80 GB", "H100"),
        ("A100 80 GiB PCIe", "A100 80GB PCIe"),
    ],
)
def test_names_as_the_driver_and_as_people_write_them(reported: str, name: str) -> None:
    assert find_gpu(reported).name == name


@pytest.mark.parametrize("name", ["", "TPU v5", "MI300X", "L40", "L20", "A10G", "GH200", "GB200", "H2", "RTX 409"])
def test_another_gpu_needs_its_memory(name: str) -> None:
    """``L40`` is no part of L40S, and L4 none of it: each is a GPU of its own."""
    with pytest.raises(SettingError, match="for another GPU give --memory GB"):
        choose_gpu(name, None)
    found = choose_gpu(name, 192.0)
    assert (found.name, found.memory_gb) == (name, 192)
    assert "assumed" in found.source


@pytest.mark.parametrize(
    ("name", "other", "near"),
    [
        ("RTX 4090 48GB", "48gb", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "laptop", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090 D", "d", "RTX 5090"),
        ("RTX 3090 Ti", "ti", "RTX 3090"),
        ("RTX 4090 Max-Q", "max q", "RTX 4090"),
        ("RTX 4090 Mobile", "mobile", "RTX 4090"),
        ("NVIDIA H20-3e", "3e", "H20"),
        ("H20 141 GB", "141gb", "H20"),
        ("H100 NVL 80GB", "80gb", "H100 NVL"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "10gb 1g mig", "H100"),
        ("L40S-24Q", "24q", "L40S"),
    ],
)
def test_a_word_that_makes_it_another_card(name: str, other: str, near: str) -> None:
    with pytest.raises(SettingError, match=f"{other!r} makes it another card .* --gpu {near!r} --memory GB"):
        choose_gpu(name, None)
    assert choose_gpu(name, 51.0).memory_gb == 51


def test_rates_of_one_chip_agree() -> None:
    """RTX 6000 Ada and L40S are both AD102 with 142 multiprocessors; Ampere has no FP8."""
    ada, l40s = find_gpu("RTX 6000 Ada"), find_gpu("L40S")
    assert (ada.tflops, ada.fp8_tflops) == (364, 728)
    assert ada.tflops == pytest.approx(l40s.tflops, rel=0.02)
    assert ada.fp8_tflops == pytest.approx(l40s.fp8_tflops, rel=0.02)
    for name in ("RTX 3090", "A40", "A10", "RTX A6000", "A100 80GB"):
        assert find_gpu(name).fp8_tflops == find_gpu(name).tflops


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
