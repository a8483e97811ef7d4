"""``ep2tp.reshard``: writes a checkpoint whose slices are whole blocks at one tensor-parallel size. CPU, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ep2tp.checkpoint.conversion import Layout
from ep2tp.checkpoint.destination import check_destination
from ep2tp.checkpoint.journal import Journal
from ep2tp.checkpoint.prepare import open_source, prepare
from ep2tp.checkpoint.run import Options, Report, Result, Run
from ep2tp.errors import SettingError


def reshard(
    source: str | Path,
    destination: str | Path,
    *,
    tp: int,
    layout: Layout = "padded",
    ranks: Iterable[int] | None = None,
    finish: bool = False,
    link: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    revision: str | None = None,
    stream: bool = False,
    config: str | Path | None = None,
    report: Report = lambda done, total: None,
) -> Result:
    """Write ``source`` as a checkpoint for tensor-parallel size ``tp``. Bit-exact; what is there is never lost.

    Args:
        source: a checkpoint folder, or a model on the hub (``owner/name``).
        destination: a new or empty folder, or one in which this conversion was interrupted.
        tp: tensor-parallel size.
        layout: ``padded`` writes a Hugging Face checkpoint for any engine, ``ranks`` a folder per rank for ep2tp's own
            load format.
        ranks, finish, link, workers: see :class:`Options`.
        overwrite: replace what an earlier conversion wrote to ``destination``.
        dry_run: check and plan everything, write nothing.
        revision: branch, tag or commit on the hub.
        stream: hold one input file at a time on disk (with one worker).
        config: config.json of a source that has none (DeepSeek's own layout).
        report: called as the work goes on.

    Returns:
        What was done. Nothing is written where no tensor needs padding, unless ``link`` is set.

    Raises:
        CheckpointError, ModelError, PatchError: the source cannot be converted, or the destination cannot be used.
        SettingError: the arguments contradict each other.

    Example:
        >>> reshard("DeepSeek-V2-Lite-FP8", "DeepSeek-V2-Lite-FP8-tp2", tp=2)  # doctest: +SKIP
    """
    options = Options(
        None if ranks is None else tuple(sorted(set(ranks))), finish, link, 1 if stream else workers or Options.workers
    )
    _check_options(options, tp, layout)
    opened = open_source(source, Path(destination), revision, stream, Path(config) if config else None)
    conversion = prepare(opened, tp, layout)
    if dry_run:
        return Result(conversion, "planned")
    if layout == "padded" and conversion.is_same and not link:
        return Result(conversion, "unneeded")
    folder = Path(destination)
    check_destination(source, folder)
    journal = Journal(folder, conversion.fingerprint())
    if overwrite:
        journal.clear()
    journal.check_free()
    if journal.manifest() is not None:
        journal.remove_state()
        return Result(conversion, "complete")
    return Run(opened, conversion, journal, options, report).run()


def _check_options(options: Options, tp: int, layout: Layout) -> None:
    if tp < 1:
        raise SettingError(f"tp={tp}: must be at least 1")
    if layout not in ("padded", "ranks"):
        raise SettingError(f"layout={layout!r}: must be 'padded' or 'ranks'")
    if layout == "padded" and (options.ranks is not None or options.finish):
        raise SettingError("ranks and finish are for layout 'ranks'")
    if options.finish and options.ranks is not None:
        raise SettingError("finish comes after all ranks are there; give one of ranks and finish")
    if options.ranks is not None and (not options.ranks or min(options.ranks) < 0 or max(options.ranks) >= tp):
        raise SettingError(f"ranks={list(options.ranks)}: must be in 0..{tp - 1}")
    if options.link and layout == "ranks":
        raise SettingError("link is for layout 'padded'; every file of layout 'ranks' is new")
