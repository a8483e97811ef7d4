"""How long collectives take on a kind of link: alpha-beta lines, fitted to measurements or taken from reports.

The model (Hockney 1994): a collective in which a rank sends ``s`` bytes takes ``alpha + s / beta``. NCCL changes its
protocol with the size, so a link has two lines for each collective, one for small messages and one for large ones.
More ranks than were measured add a latency for each further ring step.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np

_SPLIT = 1 << 20  # bytes of payload; NCCL's low-latency protocols end about there
_STEPS = {"all_reduce": 2}  # ring steps for each further rank; 1 for the others
_SENT = {"all_reduce": 2.0}  # times (n-1)/n of the payload


@dataclass(frozen=True)
class Line:
    """``alpha`` microseconds and ``us_per_byte``, for up to ``most`` sent bytes."""

    alpha: float
    us_per_byte: float
    most: float = math.inf

    def us(self, sent: float) -> float:
        """Microseconds for ``sent`` bytes."""
        return self.alpha + sent * self.us_per_byte


@dataclass(frozen=True)
class Link:
    """How GPUs are joined.

    Attributes:
        name: as ``--link`` names it.
        label: what the figures are: measured on what, reported by whom, or assumed.
        measured: whether they were measured.
        ranks: ranks of the measurement.
        step_us: microseconds that a further ring step adds.
        lines: for each collective, its lines from small messages to large; a collective without lines is timed like
            all_gather.
        environment: NCCL's variables of the measurement, of a profile; None for a built-in link, whose name says them.
    """

    name: str
    label: str
    measured: bool
    ranks: int
    step_us: float
    lines: Mapping[str, tuple[Line, ...]]
    environment: Mapping[str, str] | None = None

    def us(self, kind: str, sent: float, ranks: int) -> float:
        """Microseconds of one collective in which each of ``ranks`` ranks sends ``sent`` bytes; 0 for one rank."""
        if ranks < 2:
            return 0.0
        us = 0.0
        for line in self.lines.get(kind) or self.lines["all_gather"]:
            us = max(us, line.us(min(sent, line.most)))  # never less than for fewer bytes
            if sent <= line.most:
                break
        return us + max(0, ranks - self.ranks) * _STEPS.get(kind, 1) * self.step_us


def fit(points: Iterable[tuple[float, float]], most: float = math.inf) -> Line:
    """The line through (bytes, microseconds) with the least squared relative error; neither coefficient is negative.

    Raises:
        ValueError: there is no point.
    """
    sent, us = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    design = np.stack([1 / us, sent / us], axis=1)
    alpha, slope = np.linalg.lstsq(design, np.ones_like(us), rcond=None)[0] if len(us) > 1 else (us[0], 0.0)
    if slope < 0:
        return Line(float(np.sum(1 / us) / np.sum(1 / us**2)), 0.0, most)
    if alpha < 0:
        return Line(0.0, float(np.sum(sent / us) / np.sum((sent / us) ** 2)), most)
    return Line(float(alpha), float(slope), most)


def fit_link(name: str, label: str, ranks: int, step_us: float, rows: Iterable[Mapping[str, Any]]) -> Link:
    """Fit a link to measurements: rows with ``op``, ``bytes`` (whole payload, as in nccl-tests) and ``us``."""
    by_kind: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        sent = _SENT.get(row["op"], 1.0) * (ranks - 1) / ranks * row["bytes"]
        by_kind[row["op"]].append((row["bytes"], sent, row["us"]))
    lines: dict[str, tuple[Line, ...]] = {}
    for kind, points in by_kind.items():
        small = [(sent, us) for size, sent, us in points if size <= _SPLIT]
        large = [(sent, us) for size, sent, us in points if size >= _SPLIT]
        end = max((sent for sent, _ in small), default=0.0) if large else math.inf
        lines[kind] = tuple(fit(part, most) for part, most in ((small, end), (large, math.inf)) if part)
    return Link(name, label, True, ranks, step_us, lines)


@lru_cache(maxsize=1)
def built_in() -> Mapping[str, Link]:
    """The links that ``--link`` names.

    ``nvlink``, ``host`` and ``socket`` are fitted to collectives that ``--calibrate`` measured inside CUDA graphs, as
    engines decode, on two H100 SXM: with NCCL as it comes, with ``NCCL_P2P_DISABLE=1``, and with
    ``NCCL_SHM_DISABLE=1`` too. Engines' own all_reduce kernels over NVLink are faster than NCCL's.
    ``pcie5`` is read off two NCCL figures (13.9 us for 8 KB, 71.2 us for 64 KB, on 4 GPUs) and a bus bandwidth of 37.6
    GB/s that others report (github.com/local-inference-lab/rtx6kpro); ``pcie4`` is assumed at half its bandwidths.
    """
    text = (resources.files("ep2tp") / "planner" / "data" / "nccl_collectives_2xH100.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    found = {}
    for name, (way, step) in _MEASURED.items():
        label = f"measured: 2x H100, NCCL over {way}"
        found[name] = fit_link(name, label, 2, step, (row for row in rows if row["tag"] == name))
    reported = _reported_pcie(37.6e3, 13.9, 71.2)
    found["pcie5"] = Link("pcie5", "reported by others: 4 GPUs on PCIe 5, peer to peer", False, 4, 1.0, reported)
    half = {kind: tuple(Line(x.alpha, 2 * x.us_per_byte, x.most) for x in lines) for kind, lines in reported.items()}
    found["pcie4"] = Link("pcie4", "assumed: half the bandwidths reported for PCIe 5", False, 4, 1.0, half)
    return found


# What each was measured over, and the microseconds of a further ring step (assumed: NCCL's own tuning table's order;
# for NVLink and host memory borne out by four H100s, docs/planning.md).
_MEASURED = {
    "nvlink": ("NVLink", 0.6),
    "host": ("host memory (NCCL_P2P_DISABLE=1)", 1.0),
    "socket": ("sockets (and NCCL_SHM_DISABLE=1)", 2.7),
}


def _reported_pcie(bytes_per_us: float, us_8k: float, us_64k: float) -> dict[str, tuple[Line, ...]]:
    """Two lines from the latency of all_reduce at 8 and 64 KB over 4 ranks and the bandwidth of large ones."""
    at_8k, at_64k = 1.5 * 8192, 1.5 * 65536
    slope = (us_64k - us_8k) / (at_64k - at_8k)
    alpha = us_8k - at_8k * slope
    return {"all_gather": (Line(alpha, slope, at_64k), Line(us_64k - at_64k / bytes_per_us, 1 / bytes_per_us))}
