"""The cache of Hugging Face's hub on this machine: ``models--owner--name/snapshots/COMMIT/FILE``, links to blobs."""

from __future__ import annotations

import re
from pathlib import Path

from ep2tp.errors import CheckpointError


def model_of(folder: Path) -> dict[str, str] | None:
    """The repository and the commit that a folder of the cache holds, or None for another folder."""
    model = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not model.startswith("models--"):
        return None
    return {"repo": model.removeprefix("models--").replace("--", "/"), "revision": folder.name}


def blob_folders(folder: Path) -> list[Path]:
    """Where the links of a folder of the cache may lead: the model's blobs, and those that models share."""
    model = folder.parent.parent
    return [model / "blobs", model.parent / "blobs"] if folder.parent.name == "snapshots" else []


def check_published(label: str, name: str, path: Path, digest: str) -> None:
    """Compare the SHA-256 of a file with the hub's, where it is in the cache and the hub has one.

    A blob is named by the SHA-256 of a large file, or by the SHA-1 that git has of a small one.

    Args:
        label: what messages call the model.
        name: the file's name there.
        path: the file in the cache.
        digest: its SHA-256.

    Raises:
        CheckpointError: they differ.
    """
    published = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", published) and published != digest:
        raise CheckpointError(
            f"{label}: {name}: its SHA-256 is {digest}, the hub says {published}; its download is damaged. Remove it "
            "from the hub's cache and run the same command again"
        )


def download(repo: str, revision: str | None, unread: list[str]) -> Path:
    """A model as a folder in the cache; what is not there yet is downloaded.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit.
        unread: patterns of files that are not needed.

    Raises:
        CheckpointError: the hub does not answer, or has no such model or revision.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=unread))
    except hub_errors() as error:
        raise CheckpointError(f"{repo}: no such folder, and the hub says: {error}") from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub does not give what it was asked for.

    Its HTTP library (requests, later httpx) lets its own errors through, of time-outs and names not found, say. Their
    base is a base of huggingface_hub's, too.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    ours = ("builtins", "huggingface_hub")
    library = [base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] not in ours]
    return OSError, HFValidationError, HfHubHTTPError, *library
