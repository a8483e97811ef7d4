"""The GPUs of this machine and their links, as NVML reports them: plain data, for the checks and for ``--json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, TypeVar

from ep2tp.planner.topology import visible_gpus

T = TypeVar("T")

_ANCESTORS = {  # nvmlGpuTopologyLevel_t
    0: "one board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "one host bridge",
    40: "one NUMA node",
    50: "across NUMA nodes",
}
# nvmlGpuP2PCapsIndex_t; pynvml's own constant for "read" is a tuple by mistake (a trailing comma).
_CAPABILITIES = {"read": 0, "write": 1, "nvlink": 2, "atomics": 3}
_STATUSES = {
    0: "ok",
    1: "chipset not supported",
    2: "GPU not supported",
    3: "topology not supported",
    4: "disabled by registry key",
    5: "not supported",
    6: "unknown",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU; what NVML does not tell is None.

    Attributes:
        bus_id: PCI address, ``0000:41:00.0``.
        capability: compute capability, ``12.0``.
        memory: bytes.
        bar1: bytes of its memory that other PCIe devices can address.
        pcie_generation, pcie_width: of its link now; the ``_max`` ones are what GPU and slot agree on at most.
        pcie_generation_gpu: what the GPU alone could do.
    """

    uuid: str
    name: str
    bus_id: str
    capability: str | None = None
    memory: int | None = None
    bar1: int | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_generation_gpu: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None


@dataclass(frozen=True)
class Pair:
    """How two GPUs (by their position in :class:`Machine`) are linked.

    Attributes:
        ancestor: what they share, nearest first: ``one PCIe switch`` ... ``across NUMA nodes``.
        reported: P2P status by capability (read, write, atomics, nvlink), ``ok`` or a reason.
    """

    a: int
    b: int
    ancestor: str | None
    reported: dict[str, str]


@dataclass(frozen=True)
class Machine:
    """All of it.

    Attributes:
        problem: why NVML does not answer; empty where it does.
        driver: the driver's version.
        cuda: the CUDA version that the driver brings, ``13.0``.
        hidden: what is wrong with ``CUDA_VISIBLE_DEVICES``; empty where nothing is.
    """

    problem: str = ""
    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[Pair, ...] = ()
    hidden: str = ""

    @property
    def is_all_nvlink(self) -> bool:
        """Whether NVLink joins every pair."""
        return bool(self.pairs) and all(pair.reported.get("nvlink") == "ok" for pair in self.pairs)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; :meth:`from_json` takes it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Machine:
        """The machine that :meth:`as_json` described."""
        gpus = tuple(Gpu(**gpu) for gpu in value["gpus"])
        pairs = tuple(Pair(**pair) for pair in value["pairs"])
        return cls(**{**value, "gpus": gpus, "pairs": pairs})


def read_machine() -> Machine:
    """Ask NVML for the GPUs that this process may use (``CUDA_VISIBLE_DEVICES`` is respected)."""
    try:
        import pynvml

        return _from_nvml(pynvml)
    except Exception as error:  # NVML is the driver's library: whatever it does, the other checks go on
        return Machine(problem=str(error) or type(error).__name__)


def _from_nvml(pynvml: Any) -> Machine:
    pynvml.nvmlInit()
    try:
        visible = visible_gpus(pynvml)
        handles = visible.handles
        version = _ask(pynvml, pynvml.nvmlSystemGetCudaDriverVersion)
        return Machine(
            driver=_text(_ask(pynvml, pynvml.nvmlSystemGetDriverVersion)),
            cuda=None if version is None else f"{version // 1000}.{version % 1000 // 10}",
            gpus=tuple(_gpu(pynvml, handle) for handle in handles),
            pairs=tuple(_pair(pynvml, a, b, handles) for a, b in combinations(range(len(handles)), 2)),
            hidden=visible.problem,
        )
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    def ask(function: Callable[..., T]) -> T | None:
        return _ask(nvml, function, handle)

    memory, bar1 = ask(nvml.nvmlDeviceGetMemoryInfo), ask(nvml.nvmlDeviceGetBAR1MemoryInfo)
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability)
    return Gpu(
        uuid=str(_text(nvml.nvmlDeviceGetUUID(handle))),
        name=str(_text(nvml.nvmlDeviceGetName(handle))),
        bus_id=_bus_id(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)),
        capability=None if capability is None else "{}.{}".format(*capability),
        memory=None if memory is None else int(memory.total),
        bar1=None if bar1 is None else int(bar1.bar1Total),
        pcie_generation=ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
        pcie_generation_max=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_generation_gpu=ask(nvml.nvmlDeviceGetGpuMaxPcieLinkGeneration),
        pcie_width=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        pcie_width_max=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
    )


def _pair(nvml: Any, a: int, b: int, handles: list[Any]) -> Pair:
    level = _ask(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b])
    reported = {}
    for name, index in _CAPABILITIES.items():
        status = _ask(nvml, nvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], index)
        reported[name] = _STATUSES.get(6 if status is None else status, "unknown")
    return Pair(a, b, None if level is None else _ANCESTORS.get(level), reported)


def _ask(nvml: Any, function: Callable[..., T], *arguments: Any) -> T | None:
    """NVML's answer, or None where this GPU or driver has none."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _bus_id(value: str | None) -> str:
    """As the kernel writes it: NVML's domain has eight digits."""
    domain, _, rest = str(value).lower().partition(":")
    return f"{domain[-4:]}:{rest}"
