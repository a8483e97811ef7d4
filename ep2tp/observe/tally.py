"""Counts the collectives of one rank, finds the step that they repeat, and says which plans make such collectives."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from ep2tp.observe.evidence import ALL_REDUCE, DEP, DISPATCHED, Reading, Strength

Call = tuple[str, int]
"""A collective: its kind, and its bytes (0 where the source does not tell)."""

_RECENT = 4096
_MOST_SIZES = 256


class Tally:
    """Counts calls in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.recent: deque[Call] = deque(maxlen=_RECENT)
        self._sizes: Counter[Call] = Counter()

    def add(self, kind: str, size: int) -> None:
        """Count one call."""
        self.kinds[kind] += 1
        self.recent.append((kind, size))
        if (kind, size) in self._sizes or len(self._sizes) < _MOST_SIZES:
            self._sizes[kind, size] += 1

    def step(self) -> list[Call] | None:
        """The calls of one step, where the last calls repeat: their shortest period, seen twice or more.

        Decoding repeats, with the same number of tokens in each step. Layers within a step repeat as well, so a period
        has to hold every kind of call that recurred lately.
        """
        latest_first = list(reversed(self.recent))
        lately = Counter(kind for kind, _ in latest_first[: (len(latest_first) + 1) // 2])
        recurring = {kind for kind, count in lately.items() if count > 1}
        refused: set[int] = set()
        for length, period in reversed(list(enumerate(_periods(latest_first), 1))):
            if 2 * period > length or period in refused:
                continue
            if {kind for kind, _ in latest_first[:period]} >= recurring:
                return latest_first[:period][::-1]
            refused.add(period)
        return None

    def common(self, most: int = 4) -> str:
        """The most frequent calls in words."""
        return ", ".join(f"{count} {_shown(call)}" for call, count in self._sizes.most_common(most))


def _periods(calls: Sequence[Call]) -> list[int]:
    """The shortest period of each prefix, by length."""
    # The longest proper prefix that is also a suffix gives it (the failure function of Knuth, Morris and Pratt).
    border = [0] * len(calls)
    for i in range(1, len(calls)):
        k = border[i - 1]
        while k and calls[i] != calls[k]:
            k = border[k - 1]
        border[i] = k + (calls[i] == calls[k])
    return [length - border[length - 1] for length in range(1, len(calls) + 1)]


def in_words(calls: Sequence[Call]) -> str:
    """Calls of one step: ``7 all_reduce of 1.0 KB, 1 all_gather of 1.5 KB``."""
    return ", ".join(f"{count} {_shown(call)}" for call, count in Counter(calls).items())


def _shown(call: Call) -> str:
    kind, size = call
    if not size:
        return kind
    scale, unit = next((s for s in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if size >= s[0]), (1.0, "B"))
    return f"{kind} of {size / scale:.3g} {unit}"


def plans_of(kinds: Counter[str]) -> list[Reading]:
    """Which plans make these collectives, beside pipeline parallelism and the ends of the model.

    The logits of tensor-parallel ranks take one all_gather (or gather) a step; a plan that gathers tokens for its
    experts pairs each all_gather with a reduce_scatter, or, for uneven numbers of tokens, broadcasts with reduces.
    Collectives alone decide nothing for good: attention may exchange tokens, too, and sequence parallelism splits an
    all_reduce in two. Kernels of an all-to-all library do.
    """
    if kinds["dispatch"] or kinds["combine"]:
        return [Reading("tokens are dispatched to experts and combined by kernels of an all-to-all library", DEP)]
    if kinds["all_to_all"]:
        says = f"{kinds['all_to_all']} all_to_all exchanges: tokens are dispatched to experts and combined"
        return [Reading(says, DEP, Strength.SUPPORT)]
    scattered = kinds["reduce_scatter"] + kinds["reduce"]
    if scattered and (kinds["all_gather"] or kinds["broadcast"]):
        says = f"{scattered} reduce_scatter calls beside all_gather: tokens are gathered for experts and scattered back"
        usual = "whole experts (DEP) are the usual reason; sliced ones under data-parallel attention are the other"
        return [Reading(says, DISPATCHED, Strength.SUPPORT), Reading(usual, DEP, Strength.HINT)]
    if kinds["all_reduce"]:
        says = f"{kinds['all_reduce']} all_reduce calls and no dispatch: TP or TEP, which make the same collectives"
        if kinds["send_recv"]:
            says += f"; {kinds['send_recv']} transfers between two ranks are taken for those of a pipeline"
        return [Reading(says, ALL_REDUCE, Strength.HINT if kinds["send_recv"] else Strength.SUPPORT)]
    return []
