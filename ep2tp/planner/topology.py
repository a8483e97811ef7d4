"""How the GPUs of this machine are linked, as NVML reports it."""

from __future__ import annotations

import os
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


def links_of_job(gpus: int) -> Links:
    """Look at every pair of the first ``gpus`` GPUs that this process may use.

    Respects ``CUDA_VISIBLE_DEVICES``. A machine without an NVIDIA driver, and a job that needs more GPUs than the
    machine has (it spans nodes), count as not joined by NVLink.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Links(False, f"no NVIDIA driver answers ({error})")
    try:
        visible = visible_gpus(pynvml)
        handles = visible.handles
        if len(handles) < gpus:
            problem = visible.problem and f" ({visible.problem})"
            return Links(False, f"the job needs {gpus} GPUs and this machine shows {len(handles)}{problem}")
        for (a, first), (b, second) in combinations(enumerate(handles[:gpus]), 2):
            status = pynvml.nvmlDeviceGetP2PStatus(first, second, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
            if status != pynvml.NVML_P2P_STATUS_OK:
                return Links(False, f"GPUs {a} and {b} are not joined by NVLink")
        return Links(True, f"all {gpus} GPUs are joined by NVLink")
    except pynvml.NVMLError as error:
        return Links(False, f"NVML cannot tell how the GPUs are linked ({error})")
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(nvml: Any) -> Visible:
    """The GPUs that CUDA shows to this process: those before the first entry of the variable that names none.

    ``-1`` is the usual entry to end the list with. A UUID may be cut short where one GPU's begins so
    (CUDA C++ Programming Guide, "CUDA Environment Variables").
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = nvml.nvmlDeviceGetCount()
    if value is None:
        return Visible([nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)])
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
