"""Whether the engines' own all_reduce kernels will run here; NCCL's does in any case.

The rule, from ``custom_all_reduce.py`` of vLLM 0.25.1 to 0.33.0 and SGLang 0.5.17 to 0.5.23: 2, 4, 6 or 8 GPUs of one
node, P2P between all of them, and beyond two GPUs NVLink between all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from ep2tp.doctor.finding import Finding, Level
from ep2tp.doctor.machine import Machine
from ep2tp.doctor.transfers import Proof

CHECK = "custom all-reduce"
_SIZES = (2, 4, 6, 8)


def check_all_reduce(machine: Machine, proofs: list[Proof]) -> Iterator[Finding]:
    """One finding for a launch on all of the GPUs; none for a single GPU."""
    gpus = len(machine.gpus)
    if gpus < 2:
        return
    if gpus not in _SIZES:
        yield Finding(CHECK, Level.NOTE, f"off in vLLM and SGLang: {gpus} GPUs are not 2, 4, 6 or 8; NCCL is used")
    elif any(proof.broken for proof in proofs):
        yield Finding(CHECK, Level.NOTE, "must be off here: P2P is broken", "", "--disable-custom-all-reduce")
    elif gpus > 2 and not machine.is_all_nvlink:
        why = "NCCL's all_reduce takes several times as long for the small messages of decoding"
        do = "vLLM 0.33 with FlashInfer: VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC=1; measure, it depends on the board"
        yield Finding(CHECK, Level.NOTE, f"off in vLLM and SGLang: {gpus} GPUs without NVLink; NCCL is used", why, do)
    elif all(proof.has("write") for proof in proofs):
        yield Finding(CHECK, Level.OK, f"on in vLLM and SGLang for {gpus} GPUs")
    elif any(proof.failed for proof in proofs):
        yield Finding(CHECK, Level.UNCHECKED, "depends on P2P, which could not be proven")
    else:
        yield Finding(CHECK, Level.NOTE, "off in vLLM and SGLang: no P2P; NCCL is used")
