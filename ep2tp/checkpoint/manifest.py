"""``ep2tp.json``: what a converted checkpoint was made from, how, and the SHA-256 of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ep2tp import __version__
from ep2tp.checkpoint.conversion import Conversion

FORMAT = 1


def build_manifest(
    conversion: Conversion, fingerprint: str, notes: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]
) -> bytes:
    """The manifest. The same conversion gives the same bytes: it holds no time and no host.

    Args:
        conversion: what was done.
        fingerprint: see :meth:`Conversion.fingerprint`.
        notes: for each output file its size, SHA-256 and inputs, as in the journal.
        files: SHA-256 of each other file, config.json and the index included.
    """
    plan = conversion.plan
    inputs: dict[str, str] = {}
    for note in notes.values():
        inputs |= note["inputs"]
    manifest = {
        "format": FORMAT,
        "ep2tp": __version__,
        "source": dict(conversion.identity),
        "layout": conversion.layout,
        "ranks": plan.ranks,
        "patch": plan.facts.family.name,
        "fields": {field: list(values) for field, values in plan.fields.items()},
        "classes": {
            name: {"size": split.size, "padded": split.padded, "per_rank": split.per_rank}
            for name, split in plan.splits.items()
        },
        "inputs": dict(sorted(inputs.items())),
        "outputs": {name: {"size": note["size"], "sha256": note["sha256"]} for name, note in sorted(notes.items())},
        "files": dict(sorted(files.items())),
        "fingerprint": fingerprint,
    }
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
