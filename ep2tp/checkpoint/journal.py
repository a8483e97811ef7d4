"""What a conversion has done so far, on disk beside its output: lets it resume, and keeps a second process out.

``DST/.ep2tp`` holds ``plan.json`` (what the conversion is), a small file in ``done`` for each finished output file, a
lock for each part of the work, and files that are being written. It goes away when the manifest is written.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.writer import write_file
from ep2tp.errors import CheckpointError

STATE = ".ep2tp"
MANIFEST = "ep2tp.json"


class Journal:
    """The state of one output folder.

    Args:
        folder: the output folder; it need not exist.
        fingerprint: what the conversion is (:meth:`Conversion.fingerprint`).
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.state = folder / STATE
        self.temporary = self.state / "writing"

    def check_free(self) -> None:
        """Check that the folder is empty, or holds this very conversion.

        Raises:
            CheckpointError: it holds something else.
        """
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: is not a folder")
        found = self._found_fingerprint()
        if found is None and any(path.name != STATE for path in self.folder.iterdir()):
            raise CheckpointError(f"{self.folder}: holds files that ep2tp did not write; name an empty or a new folder")
        if found not in (None, self.fingerprint):
            raise CheckpointError(
                f"{self.folder}: holds another conversion (other source, layout or --tp); name another folder, "
                "or replace it with --overwrite"
            )

    def clear(self) -> None:
        """Remove what an earlier conversion wrote; files of anybody else are never touched.

        Raises:
            CheckpointError: the folder was not written by ep2tp, or a process is writing it.
        """
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if self._found_fingerprint() is None:
            raise CheckpointError(
                f"{self.folder}: was not written by ep2tp (it has no {MANIFEST}); ep2tp does not remove it"
            )
        self.state.mkdir(exist_ok=True)
        with self.lock([path.stem for path in self.state.glob("*.lock")]):
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @contextmanager
    def lock(self, parts: Iterable[str]) -> Iterator[None]:
        """Hold parts of the work for this process; the system lets go of them when it ends, however it ends.

        Raises:
            CheckpointError: another process holds one.
        """
        self.temporary.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for part in sorted(parts):
                handle = os.open(self.state / f"{part}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                stack.callback(os.close, handle)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise CheckpointError(
                        f"{self.folder}: another process is writing {part!r} of it; wait for it, or take other --ranks"
                    ) from None
            yield

    def begin(self) -> None:
        """Note what the conversion is. Call while a part is locked."""
        plan = json.dumps({"fingerprint": self.fingerprint}).encode()
        (self.state / "done").mkdir(exist_ok=True)
        write_file(self.state / "plan.json", plan, self.temporary / f"plan-{os.uname().nodename}-{os.getpid()}")

    def record(self, output: str, size: int, digest: str, inputs: Mapping[str, str]) -> None:
        """Note that an output file is whole, with its size in bytes, its SHA-256 and that of each input."""
        entry = {"size": size, "sha256": digest, "inputs": dict(inputs)}
        name = output.replace("/", "__") + ".json"
        write_file(self.state / "done" / name, json.dumps(entry).encode(), self.temporary / name)

    def done(self, outputs: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The notes of those output files that are whole."""
        found = {}
        for output in outputs:
            note, file = self.state / "done" / (output.replace("/", "__") + ".json"), self.folder / output
            if note.is_file() and file.is_file():
                entry = json.loads(note.read_bytes())
                if file.stat().st_size == entry["size"]:
                    found[output] = entry
        return found

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished conversion, or None."""
        path = self.folder / MANIFEST
        return json.loads(path.read_bytes()) if path.is_file() else None

    def finish(self, manifest: bytes) -> None:
        """Write the manifest, which makes the conversion finished, and remove the state."""
        write_file(self.folder / MANIFEST, manifest, self.temporary / MANIFEST)
        self.remove_state()

    def remove_state(self) -> None:
        """Remove the state of a finished conversion."""
        shutil.rmtree(self.state, ignore_errors=True)

    def _found_fingerprint(self) -> str | None:
        for path in (self.folder / MANIFEST, self.state / "plan.json"):
            if path.is_file():
                try:
                    return str(json.loads(path.read_bytes()).get("fingerprint"))
                except (ValueError, AttributeError):
                    raise CheckpointError(f"{path}: damaged; name another folder") from None
        return None
