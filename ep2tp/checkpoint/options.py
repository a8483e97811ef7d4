"""What is asked of a conversion, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ep2tp.checkpoint.conversion import Conversion, Layout
from ep2tp.errors import SettingError

Report = Callable[[int, int], None]
"""Called with (bytes of the source done, bytes of the source to do)."""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        ranks: with layout ``ranks``: the ranks whose files are written; rank 0 brings the shared files. None is all.
        finish: check that all ranks' files are there, and write what makes them a checkpoint.
        link: files that need no change are cloned or hard-linked instead of copied.
        overwrite: replace what an earlier conversion wrote.
        workers: threads.
    """

    ranks: tuple[int, ...] | None = None
    finish: bool = False
    link: bool = False
    overwrite: bool = False
    workers: int = min(8, (os.cpu_count() or 1) + 2)  # two more than cores: fsync waits

    def check(self, tp: int, layout: Layout) -> None:
        """Check that they do not contradict each other.

        Raises:
            SettingError: they do.
        """
        if tp < 1:
            raise SettingError(f"tp={tp}: must be at least 1")
        if layout not in ("padded", "ranks"):
            raise SettingError(f"layout={layout!r}: must be 'padded' or 'ranks'")
        if layout == "padded" and (self.ranks is not None or self.finish):
            raise SettingError("ranks and finish are for layout 'ranks'")
        if self.finish and self.ranks is not None:
            raise SettingError("finish comes after all ranks are there; give one of ranks and finish")
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 0 or max(self.ranks) >= tp):
            raise SettingError(f"ranks={list(self.ranks)}: must be in 0..{tp - 1}")
        if self.link and layout == "ranks":
            raise SettingError("link is for layout 'padded'; every file of layout 'ranks' is new")
        if self.overwrite and (self.finish or self.ranks is not None):
            raise SettingError(
                "overwrite removes what other machines wrote of their ranks too; name another folder, or give it "
                "neither with ranks nor with finish"
            )


@dataclass(frozen=True)
class Result:
    """What a conversion did.

    Attributes:
        conversion: the plan.
        status: ``done``, ``part`` (some ranks), ``complete`` (nothing was left to do), ``planned`` (dry run), or
            ``unneeded`` (nothing needs padding, and nothing was written).
        written: bytes of weights written by this call.
        resumed: output files that were already there.
        needed: of a dry run: bytes of disk that it would take.
        free: of a dry run: bytes of disk that are free.
        warnings: what keeps engines from loading it at the tensor-parallel size it is written for.
    """

    conversion: Conversion
    status: str
    written: int = 0
    resumed: int = 0
    needed: int = 0
    free: int = 0
    warnings: tuple[str, ...] = ()
