"""A checkpoint on the Hugging Face hub, streamed: headers by range requests, then one file at a time on disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from ep2tp.checkpoint.header import Header, header_length, parse_header
from ep2tp.checkpoint.hub_cache import hub_errors
from ep2tp.checkpoint.lock import locked
from ep2tp.checkpoint.reader import INDEX, MAX_TEXT, check_names, read_text, read_weight_map
from ep2tp.checkpoint.source import FileTensors, is_carried, is_weights, origins_of
from ep2tp.errors import CheckpointError

_TIMEOUT = 60  # seconds without an answer


class HubSource:
    """A model on the hub, never held whole: :meth:`fetch` downloads a file and removes it again.

    The files lie beside the output while they are needed, so that its disk holds the output and, for each worker, one
    input file. Token and endpoint are huggingface_hub's (``HF_TOKEN``, ``HF_ENDPOINT``).

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; resolved to its commit once, so that all files are of one commit.
        beside: the output folder.
        config: what is read as its config.json, where it has none.

    Raises:
        CheckpointError: the hub does not answer, or has no such model or revision, or only in DeepSeek's own layout.
    """

    def __init__(self, repo: str, revision: str | None, beside: Path, config: Path | None = None) -> None:
        from huggingface_hub import HfApi

        self.repo, self.label = repo, repo
        self._beside, self._guard, self._config = beside, Lock(), config
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        except hub_errors() as error:
            raise CheckpointError(f"{repo}: no such folder, and the hub says: {error}") from None
        self.commit = str(info.sha)
        self._sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        if INDEX not in self._sizes and any(re.fullmatch(r"model\d+-mp\d+\.safetensors", name) for name in self._sizes):
            raise CheckpointError(
                f"{repo}: is in DeepSeek's own layout, whose tensors are spread over all files, so it cannot be "
                "streamed; leave --stream out"
            )

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file of the repository, by name."""
        return self._sizes

    @property
    def scratch(self) -> int:
        """The largest file."""
        return max(self._sizes.values(), default=0)

    def identity(self) -> dict[str, Any]:
        """The repository and the commit."""
        return {"repo": self.repo, "revision": self.commit}

    def files(self) -> Sequence[FileTensors]:
        """See :meth:`ep2tp.checkpoint.source.Source.files`.

        Raises:
            CheckpointError: a header or the index is not to be trusted.
        """
        check_names(self.label, self._headers.values(), self._weight_map)
        return [(name, origins_of(header), header.metadata) for name, header in self._headers.items()]

    def others(self) -> dict[str, int]:
        """See :meth:`ep2tp.checkpoint.source.Source.others`."""
        unsafe = [name for name in self._sizes if Path(name).is_absolute() or ".." in Path(name).parts]
        if unsafe:
            raise CheckpointError(f"{self.repo}: names a file {unsafe[0]!r}; refused")
        return {name: size for name, size in sorted(self._sizes.items()) if is_carried(name)}

    def left_out(self) -> Iterable[str]:
        """See :meth:`ep2tp.checkpoint.source.Source.left_out`."""
        return [name for name in self._sizes if is_weights(name) and name not in self._headers]

    def read_text(self, name: str) -> bytes | None:
        """See :meth:`ep2tp.checkpoint.source.Source.read_text`."""
        if name == "config.json" and self._config is not None:
            return read_text(self._config)
        if name not in self._sizes:
            return None
        if self._sizes[name] > MAX_TEXT:
            raise CheckpointError(f"{self.repo}: {name} is larger than {MAX_TEXT} bytes; refused")
        return self._range(name, 0, self._sizes[name])

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """Download a file; it is removed when the context ends.

        Raises:
            CheckpointError: the download fails.
        """
        from huggingface_hub import hf_hub_download

        with self._place() as folder:
            try:
                path = hf_hub_download(self.repo, name, revision=self.commit, cache_dir=folder)
            except hub_errors() as error:
                raise CheckpointError(
                    f"{self.repo}: {name}: {error}; run the same command again to go on from here"
                ) from None
            yield Path(path)

    @contextmanager
    def _place(self) -> Iterator[Path]:
        """A folder for one file. There are as many as files were ever fetched at a time, so a killed process leaves no
        more than that, and the next one to take its folder empties it."""
        with ExitStack() as stack:
            with self._guard:
                self._beside.mkdir(parents=True, exist_ok=True)
                for number in count():
                    folder = self._beside / f"fetch-{number}"
                    lock = folder.with_suffix(".lock")
                    with suppress(BlockingIOError):  # another worker's or process's
                        stack.enter_context(locked(lock))
                        break
                shutil.rmtree(folder, ignore_errors=True)
            try:
                yield folder
            finally:
                with self._guard:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.unlink(missing_ok=True)
                    with suppress(OSError):  # other state is in there
                        self._beside.rmdir()

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        text = self.read_text(INDEX)
        return None if text is None else read_weight_map(Path(self.repo) / INDEX, text)

    @cached_property
    def _headers(self) -> dict[str, Header]:
        names = set((self._weight_map or {}).values())
        names = names or {name for name in self._sizes if name.endswith(".safetensors") and "/" not in name}
        if missing := sorted(names - set(self._sizes)):
            raise CheckpointError(f"{self.repo}: the index names {missing[0]}, which the repository does not have")
        if not names:
            raise CheckpointError(f"{self.repo}: holds no .safetensors file; ep2tp reads safetensors checkpoints")
        return {name: self._header(name) for name in sorted(names)}

    def _header(self, name: str) -> Header:
        path, size = Path(self.repo) / name, self._sizes[name]
        first = self._range(name, 0, min(size, 100_000))
        stop = 8 + header_length(path, first[:8], size)
        return parse_header(path, (first + self._range(name, len(first), stop))[8:stop], size)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a file."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        if start >= stop:
            return b""
        url = hf_hub_url(self.repo, name, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            response = get_session().get(url, headers=headers, timeout=_TIMEOUT)
        except hub_errors() as error:
            raise CheckpointError(f"{self.repo}: {name}: {error}; try again") from None
        data = response.content if response.status_code == 206 or (start, stop) == (0, self._sizes[name]) else b""
        if response.status_code not in (200, 206) or len(data) != stop - start:
            raise CheckpointError(
                f"{self.repo}: {name}: asked for bytes {start}..{stop}, the hub answered {response.status_code} "
                f"with {len(data)} bytes. Try again, or download the model and convert the folder"
            )
        return bytes(data)
