"""A vLLM worker for machines with one GPU: all ranks use it, and talk over gloo, since NCCL takes one rank per GPU.

Test-only, and named to vLLM by ``worker_cls``. It changes which device a rank uses and how ranks exchange tensors;
nothing of how a model is built, loaded or computed.
"""

from __future__ import annotations

import os
from typing import Any

from host_staging import HostStaging
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.v1.worker.gpu_worker import Worker


class HostStagedCommunicator(HostStaging, CudaCommunicator):
    """vLLM's communicator, its collectives staged through host memory."""


class SharedGpuWorker(Worker):
    """vLLM's own GPU worker on a GPU that it shares with the other ranks."""

    def __init__(self, vllm_config: Any, **arguments: Any) -> None:
        parallel = vllm_config.parallel_config
        gpus = [current_platform.visible_device_id_to_physical_device_id(0)] * parallel.world_size
        parallel.assigned_physical_gpu_ids = gpus
        set_assigned_physical_gpu_ids(gpus)
        current_platform.dist_backend = "gloo"
        if os.environ.get("SHARED_GPU_STAGING", "host") == "host":  # else: gloo's own handling of GPU tensors
            current_platform.get_device_communicator_cls = lambda: "shared_gpu.HostStagedCommunicator"
        super().__init__(vllm_config=vllm_config, **arguments)
