"""Carries a planned conversion out: the jobs on several threads, then what makes the folder a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock

from ep2tp.checkpoint.conversion import SHARED, Conversion, Job, part_of, rank_folder
from ep2tp.checkpoint.destination import check_space, link_or_clone
from ep2tp.checkpoint.journal import Journal
from ep2tp.checkpoint.manifest import build_manifest
from ep2tp.checkpoint.origin import InputFile
from ep2tp.checkpoint.reader import INDEX
from ep2tp.checkpoint.source import Source
from ep2tp.checkpoint.transfer import run_job
from ep2tp.checkpoint.writer import copy_file, write_file
from ep2tp.errors import CheckpointError

Report = Callable[[int, int], None]
"""Called with (bytes of the source done, bytes of the source to do)."""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        ranks: with layout ``ranks``: the ranks whose files are written; rank 0 brings the shared files. None is all.
        finish: check that all ranks' files are there, and write what makes them a checkpoint.
        link: files that need no change are cloned or hard-linked instead of copied.
        workers: threads.
    """

    ranks: tuple[int, ...] | None = None
    finish: bool = False
    link: bool = False
    workers: int = min(8, (os.cpu_count() or 1) + 2)  # two more than cores: fsync waits


@dataclass(frozen=True)
class Result:
    """What a conversion did.

    Attributes:
        conversion: the plan.
        status: ``done``, ``part`` (some ranks), ``complete`` (nothing was left to do), ``planned`` (dry run), or
            ``unneeded`` (nothing needs padding, and nothing was written).
        written: bytes of weights written by this call.
        resumed: output files that were already there.
    """

    conversion: Conversion
    status: str
    written: int = 0
    resumed: int = 0


@dataclass
class Run:
    """One call of reshard, once everything is checked.

    Attributes:
        source, conversion, options: what to do.
        journal: where, and how far it is.
        report: called as the work goes on.
    """

    source: Source
    conversion: Conversion
    journal: Journal
    options: Options
    report: Report
    stop: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)
    read: int = 0
    total: int = 0

    def run(self) -> Result:
        """Do what is left to do.

        Raises:
            CheckpointError: another process is at it, the disk is full or fails, or the source holds what the plan
                does not expect. What is done is kept.
        """
        sizes = self.conversion.sizes()
        mine = {name for name in sizes if self._is_mine(name)}
        with self.journal.lock({part_of(name) for name in mine} or {"finish"}):
            self.journal.check_free()  # again: a process that held the lock may have begun another conversion
            self.journal.begin()
            done = self.journal.done(sizes)
            todo = mine - set(done)
            linked = {n for j in self.conversion.jobs if self.options.link and j.is_unchanged for n in j.outputs}
            written = sum(sizes[name] for name in todo - linked)
            check_space(self.journal.folder, written + self.source.scratch)
            self._convert([job for job in self.conversion.jobs if todo & set(job.outputs)], todo)
            if self.options.ranks is None:
                self._finish(sizes)
            status = "done" if self.options.ranks is None else "part"
            return Result(self.conversion, status, written, len(mine) - len(todo))

    def _is_mine(self, output: str) -> bool:
        if self.options.finish:
            return False
        if self.options.ranks is None:
            return True
        tp = self.conversion.plan.ranks
        folders = {rank_folder(rank, tp) for rank in self.options.ranks} | (
            {SHARED} if 0 in self.options.ranks else set()
        )
        return part_of(output) in folders

    def _convert(self, jobs: list[Job], todo: Collection[str]) -> None:
        self.total = sum(origin.tensor.size for job in jobs for origin, _ in job.items)
        with ThreadPoolExecutor(self.options.workers, "ep2tp") as pool:
            futures = [pool.submit(self._run_job, job, todo) for job in jobs]
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            finally:  # an error or Ctrl-C: let the others stop at their next block
                self.stop.set()
                for future in futures:
                    future.cancel()

    def _run_job(self, job: Job, todo: Collection[str]) -> None:
        outputs = sorted(set(job.outputs) & set(todo))
        journal = self.journal
        with ExitStack() as stack:
            inputs = {name: stack.enter_context(self.source.fetch(name)) for name in job.inputs}
            try:
                if self.options.link and job.is_unchanged:
                    digests, written = self._link(job, inputs)
                else:
                    digests, written = run_job(job, inputs, outputs, journal.temporary, journal.folder, self._progress)
            except OSError as error:
                raise CheckpointError(
                    f"{error.filename or journal.folder}: {error.strerror} while {', '.join(outputs)} was written. "
                    "Finished files are kept; run the same command again to go on"
                ) from None
            for name, (size, digest) in written.items():
                journal.record(name, size, digest, digests)

    def _link(self, job: Job, inputs: dict[str, Path]) -> tuple[dict[str, str], dict[str, tuple[int, str]]]:
        (name, path), (output,) = *inputs.items(), job.outputs
        link_or_clone(path, self.journal.folder / output)
        file = InputFile(str(path))
        try:
            digest = file.digest()
        finally:
            file.close()
        self._progress(sum(origin.tensor.size for origin, _ in job.items))
        return {name: digest}, {output: (path.stat().st_size, digest)}

    def _progress(self, count: int) -> None:
        if self.stop.is_set():
            raise CheckpointError("stopped; finished files are kept, run the same command again to go on")
        with self.lock:
            self.read += count
            self.report(self.read, self.total)

    def _finish(self, sizes: Collection[str]) -> None:
        """Carry over the other files, then write what makes the folder a checkpoint."""
        conversion, journal = self.conversion, self.journal
        notes = journal.done(sizes)
        if missing := sorted(set(sizes) - set(notes)):
            parts = sorted({part_of(name) for name in missing})
            raise CheckpointError(
                f"{journal.folder}: {missing[0]} is not there yet ({len(missing)} such files, in {', '.join(parts)}); "
                "convert those --ranks first (rank 0 brings 'shared')"
            )
        files: dict[str, str] = {}
        for name in conversion.others:
            with self.source.fetch(name) as path:
                files[name] = copy_file(path, journal.folder / name, journal.temporary / "other")
        if conversion.index is not None:
            self._write(INDEX, conversion.index, files)
        self._write("config.json", conversion.config, files)
        journal.finish(build_manifest(conversion, journal.fingerprint, notes, files))

    def _write(self, name: str, data: bytes, files: dict[str, str]) -> None:
        files[name] = sha256(data).hexdigest()
        write_file(self.journal.folder / name, data, self.journal.temporary / name.replace("/", "__"))
