"""The kernel compiles, without a GPU, for each kind of GPU that it is meant for, and keeps out what others lack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import triton

from ep2tp.kernels.configs import KernelConfig, PassConfig, default
from tests.kernels.layers import FORMATS
from tests.kernels.offline import launches, pretend

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # CUDA C++ guide, a block's most
HOPPER_ONLY = ("griddepcontrol", "wgmma", "cp.async.bulk", "setmaxnreg")
SHAPE = (16, 1024, 176, 4)


@pytest.fixture(autouse=True)
def own_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Triton back the driver that it had."""
    monkeypatch.setattr(triton.runtime.driver, "_active", None)


def compiled(capability: int, stored: str, tokens: int, **changes: Any) -> Iterator[Any]:
    pretend(capability)
    config = replace(default(tokens, (capability // 10, capability % 10)), **changes)
    for launch in launches(config, FORMATS[stored], SHAPE, tokens):
        yield launch.compile()


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("stored", ["bf16", "fp8-16", "nvfp4"])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_defaults_compile_for_every_gpu(capability: int, stored: str, tokens: int) -> None:
    for kernel in compiled(capability, stored, tokens):
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]
        if capability < 90:
            assert not [word for word in HOPPER_ONLY if word in kernel.asm["ptx"]]


@pytest.mark.parametrize("tokens", [1, 8])
def test_no_overlap_unless_asked_for(tokens: int) -> None:
    for kernel in compiled(90, "fp8-16", tokens, overlap=False):
        assert "griddepcontrol" not in kernel.asm["ptx"]


@pytest.mark.parametrize("tokens", [1, 8])
def test_overlapping_passes_signal_and_wait(tokens: int) -> None:
    first, *later = (kernel.asm["ptx"] for kernel in compiled(90, "fp8-16", tokens, overlap=True))
    assert "griddepcontrol.launch_dependents" in first and "griddepcontrol.wait" not in first
    assert all("griddepcontrol.wait" in ptx for ptx in later)


def test_weights_are_loaded_before_the_wait() -> None:
    """The second pass' first tile of weights: 16 bytes a thread."""
    ptx = list(compiled(90, "fp8-16", 1, overlap=True))[1].asm["ptx"]
    before, _, _after = ptx.partition("griddepcontrol.wait")
    assert before.count(".v4.b32") >= 4


@pytest.mark.parametrize("tokens", [1, 8])
def test_first_pass_loads_weights_asynchronously_and_wide(tokens: int) -> None:
    config = KernelConfig(PassConfig(8, 512, 8, 6), PassConfig(16, 1024, 4, 1), by_pair=True, by_token=True)
    config = config if tokens == 1 else replace(config, gate_up=PassConfig(32, 128, 2, 4), by_pair=False, pairs=8)
    pretend(90)
    first = launches(config, FORMATS["fp8-128"], (256, 7168, 256, 8), tokens)[0].compile()
    assert first.asm["ptx"].count("cp.async.cg.shared.global") >= 6
    assert "cvt.rn.f16x2.e4m3x2" in first.asm["ptx"]
    assert "cvt.rn.bf16.f16" not in first.asm["ptx"]  # one slow instruction a value


@pytest.mark.parametrize("stored", ["bf16", "fp8-64"])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_slices_compile_for_every_gpu(capability: int, stored: str) -> None:
    """By the matrix instructions that all of them have, with weights from shared memory by the wide loads for these."""
    tile = PassConfig(16, 512, 4, 3, slices=4, registers=128)
    first, second, _ = compiled(capability, stored, 16, gate_up=tile, down=replace(tile, rows=32, stages=2))
    for kernel in (first, second):
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]
        assert "mma.sync" in kernel.asm["ptx"] and "wgmma" not in kernel.asm["ptx"]
        assert "ldmatrix" in kernel.asm["ptx"] and ".maxnreg 128" in kernel.asm["ptx"]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_inputs_in_fp8_compile_for_every_gpu(capability: int) -> None:
    """Weights go to FP8 matrix instructions as they are; SM80, which has none, multiplies in BF16."""
    tile = PassConfig(64, 64, 4, 3, input_bits=8)
    first, second, _ = compiled(capability, "fp8-64", 16, gate_up=tile, down=tile)
    for kernel in (first, second):
        code = kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]
        assert ("wgmma" in code) == (capability == 90)
        assert (code.count("e4m3.e4m3") > 0) == (capability >= 89)
        assert ("cvt.rn.f16x2.e4m3x2" in code) is False


@pytest.mark.parametrize("tokens", [1, 8])
def test_integer_arithmetic_needs_no_fp8_instructions(tokens: int) -> None:
    for kernel in compiled(80, "fp8-16", tokens):
        assert "e4m3" not in kernel.asm["ptx"]


def test_a_warp_reads_runs_of_a_row() -> None:
    """Neighbouring threads have neighbouring units, in registers and, where a thread has one, in shared memory too."""
    pretend(90)
    config = KernelConfig(PassConfig(8, 512, 8, 6), PassConfig(16, 1024, 4, 1), by_pair=True, by_token=True)
    first, second = launches(config, FORMATS["fp8-128"], (256, 7168, 256, 8), 1)
    code = first.compile().asm["ttgir"]
    assert "sizePerThread = [1, 1, 16], threadsPerWarp = [1, 32, 1]" in code
    assert "maxPhase = 1, order = [2, 1, 0]" in code
    assert "sizePerThread = [1, 1, 16], threadsPerWarp = [1, 32, 1]" in second.compile().asm["ttgir"]
