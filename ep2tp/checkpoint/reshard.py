"""``ep2tp.reshard``: writes a checkpoint whose slices are whole blocks at one tensor-parallel size. CPU, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ep2tp.checkpoint.conversion import Layout
from ep2tp.checkpoint.destination import check_destination, check_names
from ep2tp.checkpoint.journal import Journal
from ep2tp.checkpoint.loadable import check_loadable
from ep2tp.checkpoint.options import Options, Report, Result
from ep2tp.checkpoint.prepare import open_source, prepare
from ep2tp.checkpoint.reader import INDEX
from ep2tp.checkpoint.run import Run
from ep2tp.errors import CheckpointError, SettingError


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
        overwrite: first remove what an earlier conversion wrote to ``destination``, and nothing else.
        dry_run: check and plan everything, write nothing.
        revision: branch, tag or commit on the hub.
        stream: hold one input file of a hub model at a time on disk (with one worker).
        config: config.json of a source that has none (as in DeepSeek's own layout); refused where it has one.
        report: called as the work goes on.

    Returns:
        What was done. Nothing is written where no tensor needs padding, unless ``link`` is set.

    Raises:
        CheckpointError, ModelError, PatchError: the source cannot be converted (for layout ``ranks`` heads and
            vocabulary have to divide, too), or the destination cannot be used.
        SettingError: the arguments contradict each other.

    Example:
        >>> reshard("DeepSeek-V2-Lite-FP8", "DeepSeek-V2-Lite-FP8-tp2", tp=2)  # doctest: +SKIP
    """
    chosen = None if ranks is None else tuple(sorted(set(ranks)))
    options = Options(chosen, finish, link, overwrite, 1 if stream else workers or Options.workers)
    options.check(tp, layout)
    if stream and Path(source).is_dir():
        raise SettingError(f"stream is for models on the hub; {source} is a folder, of which nothing is fetched")
    folder = Path(destination)
    try:
        opened = open_source(source, folder, revision, stream, Path(config) if config else None)
        conversion = prepare(opened, tp, layout)
        warnings = check_loadable(conversion.plan, layout)
        if layout == "padded" and conversion.is_same and not link:
            return Result(conversion, "unneeded", warnings=warnings)
        files = conversion.sizes() | dict(conversion.others) | {"config.json": len(conversion.config)}
        if conversion.index is not None:
            files[INDEX] = len(conversion.index)
        check_destination(source, folder)
        check_names(folder, files)
        run = Run(opened, conversion, Journal(folder, conversion.fingerprint(), files), options, report)
        return replace(run.plan() if dry_run else run.run(), warnings=warnings)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: {error.strerror or error}; what is done so far is kept"
        ) from None
