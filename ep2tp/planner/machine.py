"""The machine that a plan is for: what was asked for, else what is here, else an assumption that the report names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ep2tp.errors import SettingError
from ep2tp.planner.gpus import DEFAULT, Gpu, find_gpu, gpus_named, unknown_gpu
from ep2tp.planner.links import Link, built_in
from ep2tp.planner.profile import find_link, profile_path, read_profile


def choose_gpu(name: str | None, memory_gb: float | None) -> Gpu:
    """The GPU: by name, by memory, both, this machine's, or an assumed one.

    Raises:
        SettingError: a name that ep2tp does not know, without the memory; or one that is part of several.
    """
    if name is not None and memory_gb is not None and not gpus_named(name):
        return replace(unknown_gpu(memory_gb), name=name)
    if name is not None:
        gpu = find_gpu(name)
        return gpu if memory_gb is None else replace(gpu, memory_gb=memory_gb, source=f"{gpu.source}, memory as given")
    if memory_gb is not None:
        return unknown_gpu(memory_gb)
    return _gpu_here() or replace(DEFAULT, source=f"assumed: no GPU here and no --gpu; {DEFAULT.source}")


def choose_link(name: str | None, gpus: int, gpu: Gpu) -> tuple[Link, Gpu]:
    """The link, and the GPU with the bandwidth that the link's profile measured, where it is the same GPU.

    Raises:
        SettingError: a name or file that is no link.
    """
    if name is not None:
        return find_link(name), gpu if name in built_in() else _with_bandwidth(name, gpu)
    stored = profile_path()
    if stored.is_file():
        return find_link(str(stored)), _with_bandwidth(str(stored), gpu)
    from ep2tp.planner.topology import links_of_job

    if links_of_job(gpus).all_nvlink:
        return built_in()["nvlink"], gpu
    link = built_in()["pcie5"]
    return replace(link, label=f"{link.label}; assumed, no --link given"), gpu


def _with_bandwidth(profile: str, gpu: Gpu) -> Gpu:
    found = read_profile(Path(profile))
    try:
        is_same = find_gpu(found.device) == find_gpu(gpu.name)
    except SettingError:
        is_same = False
    if found.bandwidth is None or not is_same:
        return gpu
    return replace(gpu, bandwidth=found.bandwidth, source=f"{gpu.source}; memory bandwidth measured ({profile})")


def _gpu_here() -> Gpu | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    try:
        return replace(find_gpu(name), memory_gb=memory, source="this machine; rates of NVIDIA's data sheet")
    except SettingError:
        return replace(unknown_gpu(memory), name=name)
