"""How the GPUs of this machine are linked, as NVML reports it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Links:
    """Whether a job's GPUs are all joined by NVLink, and the reason in words."""

    all_nvlink: bool
    why: str


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
        handles = visible_handles(pynvml)
        if len(handles) < gpus:
            return Links(False, f"the job needs {gpus} GPUs and this machine shows {len(handles)}")
        for (a, first), (b, second) in combinations(enumerate(handles[:gpus]), 2):
            status = pynvml.nvmlDeviceGetP2PStatus(first, second, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
            if status != pynvml.NVML_P2P_STATUS_OK:
                return Links(False, f"GPUs {a} and {b} are not joined by NVLink")
        return Links(True, f"all {gpus} GPUs are joined by NVLink")
    except pynvml.NVMLError as error:
        return Links(False, f"NVML cannot tell how the GPUs are linked ({error})")
    finally:
        pynvml.nvmlShutdown()


def visible_handles(nvml: object) -> list[object]:
    """NVML's handles of the GPUs that this process may use, in the order of ``CUDA_VISIBLE_DEVICES``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = nvml.nvmlDeviceGetCount()  # type: ignore[attr-defined]
    names: Iterable[str] = map(str, range(count)) if visible is None else filter(None, visible.split(","))
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name))  # type: ignore[attr-defined]
        if name.strip().isdigit()
        else nvml.nvmlDeviceGetHandleByUUID(name.strip().encode())  # type: ignore[attr-defined]
        for name in names
    ]
