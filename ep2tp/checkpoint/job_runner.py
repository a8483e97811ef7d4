"""Runs the jobs of a conversion on several threads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Lock

from ep2tp.checkpoint.conversion import Job
from ep2tp.checkpoint.destination import link_or_clone
from ep2tp.checkpoint.hub_cache import check_published
from ep2tp.checkpoint.journal import Journal
from ep2tp.checkpoint.options import Options, Report
from ep2tp.checkpoint.origin import InputFile
from ep2tp.checkpoint.source import Source
from ep2tp.checkpoint.transfer import run_job
from ep2tp.errors import CheckpointError


class JobRunner:
    """The jobs of one call of reshard.

    Args:
        source, journal, options: where from, where to, and how.
        report: called as the work goes on.
    """

    def __init__(self, source: Source, journal: Journal, options: Options, report: Report) -> None:
        self.source, self.journal, self.options, self.report = source, journal, options, report
        self._stop, self._lock = Event(), Lock()
        self._done = self._total = 0

    def run(self, jobs: Iterable[Job], todo: Collection[str]) -> None:
        """Write those output files of the jobs that are to do, and note each in the journal.

        Raises:
            CheckpointError: the disk is full or fails, or the source holds what the plan does not expect.
        """
        left = [job for job in jobs if set(job.outputs) & set(todo)]
        self._total = sum(origin.tensor.size for job in left for origin, _ in job.items)
        with ThreadPoolExecutor(self.options.workers, "ep2tp") as pool:
            futures = [pool.submit(self._run_job, job, todo) for job in left]
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            finally:  # an error or Ctrl-C: let the others stop at their next block
                self._stop.set()
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
            for name, digest in digests.items():
                check_published(self.source.label, name, inputs[name], digest)
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
        if self._stop.is_set():
            raise CheckpointError("stopped; finished files are kept, run the same command again to go on")
        with self._lock:
            self._done += count
            self.report(self._done, self._total)
