"""How the GPUs are linked: NVLink, PCIe generation and width, and what each pair shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ep2tp.doctor.finding import Finding, Level, of_each
from ep2tp.doctor.machine import Gpu, Machine

CHECK = "links"


def check_links(machine: Machine) -> Iterator[Finding]:
    """Findings on links; none without two GPUs."""
    if len(machine.gpus) > 1:
        yield _nvlink(machine)
        yield from _shared(machine)
    found = [(str(i), finding) for i, gpu in enumerate(machine.gpus) for finding in _pcie(gpu, machine.is_all_nvlink)]
    yield from of_each(found, "GPU", len(machine.gpus))


def _nvlink(machine: Machine) -> Finding:
    joined = sum(pair.reported.get("nvlink") == "ok" for pair in machine.pairs)
    if machine.is_all_nvlink:
        why = "expert parallelism may be the better plan here at large batches; EP2TP=auto leaves launches as they are"
        return Finding(CHECK, Level.OK, f"NVLink joins all {len(machine.gpus)} GPUs", why)
    why = "EP2TP=auto rewrites expert-parallel launches here: their dispatch would cross PCIe"
    if joined:
        what = f"NVLink joins {joined} of {len(machine.pairs)} pairs of GPUs"
        do = "a launch on GPUs that are all joined: CUDA_VISIBLE_DEVICES, listing them"
        return Finding(CHECK, Level.NOTE, what, why, do)
    return Finding(CHECK, Level.OK, f"no NVLink between the {len(machine.gpus)} GPUs", why)


def _shared(machine: Machine) -> Iterator[Finding]:
    counts = Counter(pair.ancestor or "not told" for pair in machine.pairs)
    what = "nearest common ancestor: " + ", ".join(f"{name}: {count} of the pairs" for name, count in counts.items())
    if counts["across NUMA nodes"] and not machine.is_all_nvlink:
        why = "pairs across NUMA nodes talk through the link between CPU sockets, and every all_reduce waits for it"
        yield Finding(CHECK, Level.NOTE, what, why, "prefer GPUs of one socket where a model fits on them")
    else:
        yield Finding(CHECK, Level.OK, what)


def _pcie(gpu: Gpu, is_all_nvlink: bool) -> Iterator[Finding]:
    generation, generation_max, width, width_max = (
        gpu.pcie_generation,
        gpu.pcie_generation_max,
        gpu.pcie_width,
        gpu.pcie_width_max,
    )
    if generation is None or generation_max is None or width is None or width_max is None:
        yield Finding(CHECK, Level.UNCHECKED, "the driver does not tell the PCIe link")
        return
    if width < width_max:
        level = Level.NOTE if is_all_nvlink else Level.DEGRADED
        what, why = f"PCIe x{width}, where x{width_max} is possible", "all_reduce is as fast as the narrowest link"
        yield Finding(CHECK, level, what, why, "reseat the card; see the slot, riser and bifurcation settings")
    if generation < generation_max:
        what = f"PCIe generation {generation} now, {generation_max} at most"
        why = "idle GPUs slow their link down; under load it should be the most"
        yield Finding(CHECK, Level.NOTE, what, why, "look again while they compute")
    elif (gpu.pcie_generation_gpu or 0) > generation_max:
        what = f"PCIe generation {generation_max}, where the GPU could do {gpu.pcie_generation_gpu}"
        yield Finding(CHECK, Level.NOTE, what, "the slot, a riser or the BIOS holds it back", "see the BIOS")
    elif width == width_max:
        yield Finding(CHECK, Level.OK, f"PCIe generation {generation} x{width}, the most there is")
