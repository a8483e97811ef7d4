"""What a conversion has done so far, on disk beside its output: lets it resume, and keeps other processes out.

``DST/.ep2tp`` holds ``plan.json`` (what the conversion is and which files it writes), a note in ``done`` for each
finished weight file, a lock for each rank that is being written, and files that are being written. ``DST/.ep2tp.lock``
is the lock of the whole folder: shared by processes that write some ranks each, and held alone by all who write or
remove anything else. Both go away when the manifest is written, the lock last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.earlier import LOCK, PLAN, STATE, check_free, load, remove_earlier
from ep2tp.checkpoint.lock import locked
from ep2tp.checkpoint.manifest import MANIFEST
from ep2tp.checkpoint.writer import make_folder, write_file
from ep2tp.errors import CheckpointError


class Journal:
    """The state of one output folder.

    Args:
        folder: the output folder; it need not exist.
        fingerprint: what the conversion is (:meth:`Conversion.fingerprint`).
        files: bytes of each file that the conversion writes, but the manifest.
    """

    def __init__(self, folder: Path, fingerprint: str, files: Mapping[str, int]) -> None:
        self.folder, self.fingerprint, self.files = folder, fingerprint, files
        self.state = folder / STATE
        self.temporary = self.state / "writing"

    @property
    def is_open(self) -> bool:
        """Whether a process is at work on the folder, or was killed at it."""
        return (self.folder / LOCK).exists()

    @contextmanager
    def lock(self, parts: Collection[str] | None = None) -> Iterator[None]:
        """Hold some parts of the work for this process, or all of it. Where nothing was begun, nothing is left behind.

        Raises:
            CheckpointError: another process holds one, or the folder cannot be written to.
        """
        busy = "it; wait for it"
        with ExitStack() as stack:
            try:
                make_folder(self.folder)
                stack.enter_context(locked(self.folder / LOCK, shared=parts is not None))
                make_folder(self.temporary)
                for part in sorted(parts or ()):
                    busy = f"{part!r} of it; wait for it, or take other --ranks"
                    stack.enter_context(locked(self.state / f"{part}.lock"))
            except BlockingIOError:
                raise CheckpointError(f"{self.folder}: another process is writing {busy}") from None
            try:
                yield
            except Exception:
                if parts is None and not (self.folder / PLAN).is_file():
                    self.remove_state()
                raise

    def remove_leftovers(self, parts: Collection[str] | None = None) -> None:
        """Remove :meth:`leftovers`. Call under the lock of these parts."""
        for path in self.leftovers(parts):
            path.unlink(missing_ok=True)

    def leftovers(self, parts: Collection[str] | None = None) -> list[Path]:
        """What a process that was killed was writing of these parts; or of all, and what it had fetched."""
        places = [self.temporary] if parts is not None else [self.temporary, *self.state.glob("fetch-*")]
        files = [Path(folder, name) for place in places for folder, _, names in os.walk(place) for name in names]
        return [path for path in files if parts is None or path.name.partition("__")[0] in parts]

    def check_free(self, replace: bool = False) -> None:
        """See :func:`ep2tp.checkpoint.earlier.check_free`."""
        check_free(self.folder, self.fingerprint, self.files, replace)

    def begin(self, replace: bool = False) -> None:
        """Note what the conversion is. Call under the lock.

        Args:
            replace: first remove what an earlier conversion wrote. Call under the lock of the whole folder.

        Raises:
            CheckpointError: the folder holds something else.
        """
        plan = json.dumps({"fingerprint": self.fingerprint, "files": sorted(self.files)}).encode()
        with locked(self.state / "plan.lock", wait=True):  # processes with other ranks begin at the same time
            self.check_free(replace)
            if replace:
                remove_earlier(self.folder)
            if replace or not (self.folder / PLAN).is_file():
                write_file(self.folder / PLAN, plan, self.temporary / "plan")
            if replace:  # only now: if it was killed before, the next one must know what to remove
                (self.folder / MANIFEST).unlink(missing_ok=True)

    def record(self, output: str, size: int, digest: str, inputs: Mapping[str, str]) -> None:
        """Note that an output file is whole, with its size in bytes, its SHA-256 and that of each input."""
        note = {"output": output, "fingerprint": self.fingerprint, "size": size, "sha256": digest}
        data, path = json.dumps(note | {"inputs": dict(inputs)}).encode(), self._note(output)
        write_file(path, data, self.temporary / f"{output.rpartition('/')[0]}__{path.name}")

    def done(self, outputs: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The notes of those output files that are whole."""
        found = {}
        for output in outputs:
            note = load(self._note(output))
            if note and note.get("fingerprint") == self.fingerprint and self.has(output, note["size"]):
                found[output] = note
        return found

    def has(self, name: str, size: int) -> bool:
        """Whether a file is there and has so many bytes."""
        path = self.folder / name
        return path.is_file() and path.stat().st_size == size

    def is_finished(self) -> bool:
        """Whether this conversion is finished.

        Raises:
            CheckpointError: it is, but a file that it wrote is missing or has another size.
        """
        manifest = load(self.folder / MANIFEST)
        if manifest is None or manifest.get("fingerprint") != self.fingerprint:
            return False
        if wrong := [name for name, size in self.files.items() if not self.has(name, size)]:
            raise CheckpointError(
                f"{self.folder / wrong[0]}: is missing or not as long as ep2tp wrote it ({len(wrong)} such files), and "
                f"{MANIFEST} says that the conversion is finished; convert again with --overwrite"
            )
        return True

    def finish(self, manifest: bytes) -> None:
        """Write the manifest, which makes the conversion finished. Call as the last thing under the whole lock."""
        write_file(self.folder / MANIFEST, manifest, self.temporary / MANIFEST)
        self.remove_state()

    def tidy(self) -> None:
        """Remove the state of this conversion if it is finished and no process is at it."""
        with suppress(CheckpointError), self.lock():
            if self.is_finished():
                self.remove_state()

    def remove_state(self) -> None:
        """Remove the state of a finished conversion. Call as the last thing under the whole lock."""
        shutil.rmtree(self.state, ignore_errors=True)
        (self.folder / LOCK).unlink(missing_ok=True)

    def _note(self, output: str) -> Path:
        """Where a note is; its name is short however long the output's is."""
        return self.state / "done" / f"{hashlib.sha256(output.encode()).hexdigest()}.json"
