"""Carries a planned conversion out: checks the destination, runs the jobs, writes what makes it a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from ep2tp.checkpoint.conversion import SHARED, Conversion, part_of, rank_folder
from ep2tp.checkpoint.destination import check_space, freed_by
from ep2tp.checkpoint.earlier import earlier_files
from ep2tp.checkpoint.hub_cache import check_published
from ep2tp.checkpoint.job_runner import JobRunner
from ep2tp.checkpoint.journal import Journal
from ep2tp.checkpoint.manifest import build_manifest
from ep2tp.checkpoint.options import Options, Report, Result
from ep2tp.checkpoint.reader import INDEX
from ep2tp.checkpoint.source import Source
from ep2tp.checkpoint.writer import copy_file, write_file
from ep2tp.errors import CheckpointError, OtherConversionError

_LOOKS = 3


@dataclass
class Run:
    """One call of reshard, once its source is checked.

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

    def __post_init__(self) -> None:
        self.sizes = self.conversion.sizes()
        self.mine = {name for name in self.sizes if self._is_mine(name)}
        self.parts = None if self.options.ranks is None else {part_of(name) for name in self.mine}

    def plan(self) -> Result:
        """Check the destination and its disk; writes nothing.

        Raises:
            CheckpointError: the conversion cannot be written there.
        """
        planned = self._look_beside_others()
        if isinstance(planned, CheckpointError):
            busy = f"or another process is writing {self.journal.folder} at this moment: then wait for it"
            raise CheckpointError(f"{planned} ({busy})")
        return planned

    def run(self) -> Result:
        """Do what is left to do.

        Raises:
            CheckpointError: another process is at it, the disk is full or fails, or the source holds what the plan
                does not expect. What is done is kept.
        """
        planned = self._look_beside_others()  # the lock is a file, and the folder may turn out to be somebody else's
        if isinstance(planned, Result) and planned.status == "complete" and not self.journal.is_open:
            return planned
        with self.journal.lock(self.parts):
            if self._look().status != "complete":  # else by the process that held the lock
                return self._convert()
        self.journal.tidy()
        return Result(self.conversion, "complete")

    def _convert(self) -> Result:
        """Do it; call under the lock."""
        journal, options = self.journal, self.options
        journal.begin(options.overwrite)
        journal.remove_leftovers(self.parts)
        todo = self.mine - set(journal.done(self.sizes))
        JobRunner(self.source, journal, options, self.report).run(self.conversion.jobs, todo)
        if options.ranks is None:
            self._finish()
        written = sum(self.sizes[name] for name in todo - self._linked())
        status = "done" if options.ranks is None else "part"
        return Result(self.conversion, status, written, len(self.mine) - len(todo))

    def _look(self) -> Result:
        """What there is to do, and whether it can be done."""
        if not self.options.overwrite and self.journal.is_finished():
            return Result(self.conversion, "complete")
        self.journal.check_free(self.options.overwrite)
        needed = self._needed()
        return Result(self.conversion, "planned", needed=needed, free=check_space(self.journal.folder, needed))

    def _look_beside_others(self) -> Result | CheckpointError:
        """As :meth:`_look`, without the lock.

        A process at work on the folder can make files and notes disagree while they are looked at: a refusal is certain
        only where none is. Where one has ended since, the next look tells.

        Returns:
            The refusal instead where a process is at work, or was killed at it.

        Raises:
            CheckpointError: a refusal that is certain.
        """
        for _ in range(_LOOKS):
            try:
                return self._look()
            except OtherConversionError:  # its note is exchanged as a whole
                raise
            except (CheckpointError, OSError) as error:
                refusal = error
            if self.journal.is_open:
                return CheckpointError(str(refusal))
        raise refusal

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

    def _linked(self) -> set[str]:
        return {name for job in self.conversion.jobs if self.options.link and job.is_unchanged for name in job.outputs}

    def _needed(self) -> int:
        """Bytes of disk that the run takes beyond what it removes first."""
        journal, is_new = self.journal, self.options.overwrite
        todo = self.mine - self._linked() - set(() if is_new else journal.done(self.sizes))
        needed = self.source.scratch + sum(self.sizes[name] for name in todo)
        if self.options.ranks is None:
            others = {name: size for name, size in journal.files.items() if name not in self.sizes}
            needed += sum(size for name, size in others.items() if is_new or not journal.has(name, size))
        removed = journal.leftovers(self.parts) + (earlier_files(journal.folder) if is_new else [])
        return max(0, needed - freed_by(removed))

    def _finish(self) -> None:
        """Carry over the other files, then write what makes the folder a checkpoint."""
        conversion, journal = self.conversion, self.journal
        notes = journal.done(self.sizes)
        if missing := sorted(set(self.sizes) - set(notes)):
            parts = sorted({part_of(name) for name in missing})
            raise CheckpointError(
                f"{journal.folder}: {missing[0]} is not there yet ({len(missing)} such files, in {', '.join(parts)}); "
                "convert those --ranks first (rank 0 brings 'shared')"
            )
        files: dict[str, str] = {}
        for name in conversion.others:
            with self.source.fetch(name) as path:
                files[name] = copy_file(path, journal.folder / name, journal.temporary / "other")
                check_published(self.source.label, name, path, files[name])
        if conversion.index is not None:
            self._write(INDEX, conversion.index, files)
        self._write("config.json", conversion.config, files)
        journal.finish(build_manifest(conversion, journal.fingerprint, notes, files))

    def _write(self, name: str, data: bytes, files: dict[str, str]) -> None:
        files[name] = sha256(data).hexdigest()
        write_file(self.journal.folder / name, data, self.journal.temporary / name)
