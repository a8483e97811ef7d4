"""How the GPUs of this machine are linked, as NVML reports it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Links:
    """Whether a job's GPUs are all joined by NVLink, and the reason in words."""

    all_nvlink: bool
    why: str


@dataclass(frozen=True)
class Visible:
    """The GPUs that this process may use.

    Attributes:
        handles: NVML's, in the order of ``CUDA_VISIBLE_DEVICES``.
        problem: what is wrong with that variable; empty where nothing is.
    """

    handles: list[Any]
    problem: str = ""


def links_of_job(gpus: int, devices: Sequence[int | str] = (), sees_own_gpus_only: bool = False) -> Links:
    """Look at every pair of a job's GPUs.

    Respects ``CUDA_VISIBLE_DEVICES``. A machine without an NVIDIA driver, and a job that needs more GPUs than the
    machine has (it spans nodes), count as not joined by NVLink.

    Args:
        gpus: GPUs of the job: the first ones that this process may use.
        devices: its GPUs, where they are not the first ones: their places among those that this process may use, or
            their UUIDs.
        sees_own_gpus_only: this process is one of several of the job, which may each be shown GPUs of their own. Where
            it sees too few, all GPUs of the machine are looked at.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Links(False, f"no NVIDIA driver answers ({error})")
    try:
        visible = visible_gpus(pynvml)
        handles = visible.handles
        if sees_own_gpus_only and len(handles) < gpus <= pynvml.nvmlDeviceGetCount():
            return _between(pynvml, dict(enumerate(_all_gpus(pynvml))))
        if len(handles) < gpus:
            problem = visible.problem and f" ({visible.problem})"
            return Links(False, f"the job needs {gpus} GPUs and this machine shows {len(handles)}{problem}")
        named = {device: _named(pynvml, device, handles) for device in devices or range(gpus)}
        if missing := [device for device, handle in named.items() if handle is None]:
            return Links(False, f"the launch names GPU {missing[0]}, and this machine shows {len(handles)} GPUs")
        return _between(pynvml, named)
    except pynvml.NVMLError as error:
        return Links(False, f"NVML cannot tell how the GPUs are linked ({error})")
    finally:
        pynvml.nvmlShutdown()


def _between(nvml: Any, handles: Mapping[int | str, Any]) -> Links:
    for (a, first), (b, second) in combinations(handles.items(), 2):
        if nvml.nvmlDeviceGetP2PStatus(first, second, nvml.NVML_P2P_CAPS_INDEX_NVLINK) != nvml.NVML_P2P_STATUS_OK:
            return Links(False, f"GPUs {a} and {b} are not joined by NVLink")
    return Links(True, f"all {len(handles)} GPUs are joined by NVLink")


def _named(nvml: Any, device: int | str, handles: list[Any]) -> Any | None:
    """The GPU that a launch names by its place among the visible ones, or by its UUID; None where there is none."""
    if isinstance(device, str) and not device.isdecimal():
        return _handle(nvml, device, nvml.nvmlDeviceGetCount())
    return handles[int(device)] if 0 <= int(device) < len(handles) else None


def _all_gpus(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]


def visible_gpus(nvml: Any) -> Visible:
    """The GPUs that CUDA shows to this process: those before the first entry of the variable that names none.

    ``-1`` is the usual entry to end the list with. A UUID may be cut short where one GPU's begins so
    (CUDA C++ Programming Guide, "CUDA Environment Variables").
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = nvml.nvmlDeviceGetCount()
    if value is None:
        return Visible(_all_gpus(nvml))
    handles: list[Any] = []
    for name in map(str.strip, value.split(",") if value.strip() else ()):
        if name == "-1":
            break
        handle = _handle(nvml, name, count)
        if handle is None:
            problem = f"CUDA_VISIBLE_DEVICES={value}: {name!r} does not name one of this machine's {count} GPUs"
            return Visible(handles, f"{problem}, and CUDA hides it and what follows")
        handles.append(handle)
    return Visible(handles)


def _handle(nvml: Any, name: str, count: int) -> Any | None:
    """NVML's handle of the GPU that an entry of the variable names, or None."""
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name)) if int(name) < count else None
    try:
        return nvml.nvmlDeviceGetHandleByUUID(name.encode())
    except nvml.NVMLError:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)] if name.startswith("GPU-") else []
    fitting = [handle for handle in handles if _uuid(nvml, handle).startswith(name)]
    return fitting[0] if len(fitting) == 1 else None


def _uuid(nvml: Any, handle: Any) -> str:
    uuid: str | bytes = nvml.nvmlDeviceGetUUID(handle)
    return uuid.decode() if isinstance(uuid, bytes) else uuid
