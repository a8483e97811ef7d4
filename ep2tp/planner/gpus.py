"""GPUs by name: memory, memory bandwidth and arithmetic. From NVIDIA's data sheets, dense figures without sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ep2tp.errors import SettingError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as a person writes it.
        memory_gb: memory in GB of 1e9 bytes, as the driver reports it (below the GiB of the name).
        bandwidth: memory bandwidth in bytes a second.
        tflops: BF16 arithmetic, 1e12 operations a second, tensor cores with FP32 sums.
        fp8_tflops: the same in FP8; that of BF16 where the GPU has no FP8.
        source: where the figures come from.
    """

    name: str
    memory_gb: float
    bandwidth: float
    tflops: float
    fp8_tflops: float
    source: str = "NVIDIA's data sheet"


_GIB = 1.073741824
_TABLE = [  # name, GiB, TB/s, BF16 TFLOPS, FP8 TFLOPS
    ("RTX PRO 6000", 95, 1.792, 503, 1007),
    ("RTX 5090", 31.8, 1.792, 209, 419),
    ("RTX 4090", 23.9, 1.008, 165, 330),
    ("RTX 3090", 23.7, 0.936, 71, 71),  # memory of this one, A40 and A10: estimated from cards alike
    ("RTX 6000 Ada", 47.9, 0.960, 364, 728),  # half of the sheet's 1457 TFLOPS, which are FP8 with sparsity
    ("RTX A6000", 47.9, 0.768, 155, 155),
    ("L40S", 44.9, 0.864, 362, 733),
    ("L4", 22.5, 0.300, 121, 242),
    ("A40", 44.5, 0.696, 149.7, 149.7),
    ("A10", 22.4, 0.600, 125, 125),
    ("A100 40GB", 39.5, 1.555, 312, 312),
    ("A100 PCIe 40GB", 39.5, 1.555, 312, 312),
    ("A100 80GB PCIe", 79.3, 1.935, 312, 312),
    ("A100 80GB", 79.3, 2.039, 312, 312),
    ("H100 PCIe", 79.6, 2.0, 756, 1513),
    ("H100 NVL", 93.6, 3.9, 835, 1671),
    ("H100", 79.6, 3.35, 989, 1979),
    ("H200", 139.8, 4.8, 989, 1979),
    ("H20", 95.6, 4.0, 148, 296),
    ("B200", 178.3, 8.0, 2250, 4500),
]
GPUS = [Gpu(name, gib * _GIB, tb * 1e12, bf16, fp8) for name, gib, tb, bf16, fp8 in _TABLE]
DEFAULT = GPUS[0]
_NOISE = r"nvidia|geforce|blackwell|sxm\d?|hbm\w*"
_SAME_CARD = {"edition", "generation", "workstation", "server", "gpu", "tesla", "pcie"}
_SAME_CARD_OF = {"RTX PRO 6000": {"max", "q"}, "H200": {"nvl"}}
_BOARD = 1.08  # memory on the board, which names state, over what the driver reports at the least (ECC, reserved)


def find_gpu(name: str) -> Gpu:
    """The GPU that ``name`` means; case, ``NVIDIA`` and punctuation do not matter.

    Raises:
        SettingError: none, or a name that is part of several.
    """
    found = gpus_named(name)
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingError(f"--gpu {name!r} may be {' or '.join(gpu.name for gpu in found)}: write one of them")
    names = ", ".join(gpu.name for gpu in GPUS)
    hint = ""
    if near := _inside(name):
        other = " ".join(sorted(_other_words(near, name)))
        hint = (
            f"{other!r} makes it another card than the {near.name}, whose rates --gpu {near.name!r} --memory GB takes; "
        )
    raise SettingError(f"--gpu {name!r}: {hint}ep2tp knows {names}; for another GPU give --memory GB too")


def gpus_named(name: str) -> list[Gpu]:
    """The GPUs that ``name`` may mean; none where it has a word that makes it a card of its own.

    Words count whole, since L40 and GH200 are neither L40S nor H200. What is not known to mean the same card (Laptop,
    Ti, D, 3e, a MIG slice, another memory) means another, of which neither memory nor rates are known.
    """
    if exact := [gpu for gpu in GPUS if _key(gpu.name) == _key(name)]:
        return exact
    if found := _inside(name):
        return [] if _other_words(found, name) else [found]
    wanted = _words(name)
    return [gpu for gpu in GPUS if wanted and wanted <= _words(gpu.name)]


def unknown_gpu(memory_gb: float) -> Gpu:
    """A GPU of which only the memory is known: bandwidth and arithmetic are assumed to be :data:`DEFAULT`'s."""
    gpu = DEFAULT
    source = f"memory as given; bandwidth and arithmetic assumed: those of an {gpu.name}"
    return Gpu(f"{memory_gb:g} GB GPU", memory_gb, gpu.bandwidth, gpu.tflops, gpu.fp8_tflops, source)


def _inside(name: str) -> Gpu | None:
    """The GPU with the longest name of which every word is in ``name``."""
    wanted = _words(name)
    return max((gpu for gpu in GPUS if _words(gpu.name) <= wanted), key=lambda gpu: len(gpu.name), default=None)


def _other_words(gpu: Gpu, name: str) -> set[str]:
    """The words of ``name`` that do not fit a GPU."""
    left = _words(name) - _words(gpu.name) - _SAME_CARD - _SAME_CARD_OF.get(gpu.name, set())
    return {word for word in left if not _is_memory_of(gpu, word)}


def _is_memory_of(gpu: Gpu, word: str) -> bool:
    named, reported = re.fullmatch(r"(\d+)gb", word), gpu.memory_gb / _GIB
    return named is not None and reported <= int(named[1]) <= reported * _BOARD


def _key(name: str) -> str:
    return re.sub(rf"{_NOISE}|[^a-z0-9]", "", name.lower())


def _words(name: str) -> set[str]:
    joined = re.sub(r"(\d)[\s-]*gi?b\b", r"\1gb", name.lower())
    return {word for word in re.findall(r"[a-z0-9]+", joined) if not re.fullmatch(_NOISE, word)}
