"""A conversion, planned: which files come of which, and what of each tensor's bytes goes where. Reads headers only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ep2tp.checkpoint.census import Census
from ep2tp.checkpoint.header import StoredTensor, build_header, item_bytes
from ep2tp.checkpoint.origin import Origin
from ep2tp.checkpoint.runs import Target, copied, of_rank, padded
from ep2tp.errors import CheckpointError
from ep2tp.model.families import config_parts
from ep2tp.model.sharding import ShardPlan

Layout = Literal["padded", "ranks"]
SHARED = "shared"
CUTS = "ep2tp.cuts"
"""In ``__metadata__`` of a rank file: for each slice, JSON of its (axis, parts)."""


Item = tuple[Origin, tuple[tuple[str, Target], ...]]


@dataclass(frozen=True)
class Job:
    """One run over the source.

    Attributes:
        inputs: the source's files that it reads; where there are several, other jobs read (and hash) them whole.
        items: each tensor of the source, and the tensors (output file, target) made from it, in the order of the data.
        headers: for each output file, all that comes before its data.
    """

    inputs: tuple[str, ...]
    items: tuple[Item, ...]
    headers: Mapping[str, bytes]

    def sizes(self) -> dict[str, int]:
        """Bytes of each output file."""
        sizes = {name: len(header) for name, header in self.headers.items()}
        for _, targets in self.items:
            for name, target in targets:
                sizes[name] += target.size
        return sizes

    @property
    def is_unchanged(self) -> bool:
        """Whether its only output is its only input: the same name, and every tensor a copy."""
        is_one_file = len(self.inputs) == 1 and list(self.inputs) == list(self.headers)
        return is_one_file and all(target.is_copy for _, targets in self.items for _, target in targets)


@dataclass(frozen=True)
class Conversion:
    """Everything about the new checkpoint but the bytes of its weights.

    Attributes:
        plan: how the MLP weights are sliced.
        layout: ``padded`` or ``ranks``.
        jobs: the work.
        config: the new config.json.
        index: the new index, or None where it needs none.
        others: bytes of each file that is carried over.
        identity: what the source is.
    """

    plan: ShardPlan
    layout: Layout
    jobs: tuple[Job, ...]
    config: bytes
    index: bytes | None
    others: Mapping[str, int]
    identity: Mapping[str, Any]

    def sizes(self) -> dict[str, int]:
        """Bytes of each weight file to write."""
        return {name: size for job in self.jobs for name, size in job.sizes().items()}

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(origin.tensor.size for job in self.jobs for origin, _ in job.items)

    @property
    def is_same(self) -> bool:
        """Whether every weight file would be the source's, byte for byte."""
        return all(job.is_unchanged for job in self.jobs)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the output's bytes, but the values of the weights."""
        headers = {n: hashlib.sha256(h).hexdigest() for job in self.jobs for n, h in job.headers.items()}
        what = [self.identity, self.layout, self.plan.ranks, headers, self.config.decode(), self.others]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def part_of(output: str) -> str:
    """The part of the work that an output file belongs to: ``shared``, ``rank-3-of-8``, or ``all``."""
    return output.rpartition("/")[0] or "all"


def rank_folder(rank: int, ranks: int) -> str:
    """The folder of one rank's slices."""
    return f"rank-{rank}-of-{ranks}"


def plan_jobs(
    files: Iterable[tuple[str, Sequence[Origin], Mapping[str, str]]], plan: ShardPlan, layout: Layout
) -> tuple[Job, ...]:
    """Plan the output of each of the source's files.

    Args:
        files: (name, tensors in the order of their data, metadata).

    Raises:
        CheckpointError: a tensor does not fit the plan, or scales or experts are missing.
    """
    seen = Census(plan)
    jobs = []
    for name, origins, metadata in files:
        items = [(origin, tuple(_targets(name, origin.tensor, plan, layout, seen))) for origin in origins]
        if not _is_aligned(items):
            items.sort(key=lambda item: -item_bytes(item[0].tensor.dtype))
        inputs = tuple(dict.fromkeys(part.file.name for origin in origins for part in origin.parts))
        jobs.append(Job(inputs, tuple(items), _headers(items, metadata)))
    seen.check()
    return tuple(job for job in jobs if job.items)


def new_config(config: Mapping[str, Any], plan: ShardPlan) -> bytes:
    """config.json with the padded sizes, and nothing else changed."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    for part in config_parts(changed):
        for field, (before, after) in plan.fields.items():
            if part.get(field) == before:
                part[field] = after  # type: ignore[index]
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def new_index(jobs: Sequence[Job], had_index: bool) -> bytes | None:
    """The index of the output files; None for a single file that had none."""
    if len(jobs) == 1 and not had_index:
        return None
    targets = [(name, target) for job in jobs for _, found in job.items for name, target in found]
    weight_map = {target.name: name for name, target in sorted(targets, key=lambda found: found[1].name)}
    total = sum(target.size for _, target in targets)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _targets(
    file: str, tensor: StoredTensor, plan: ShardPlan, layout: Layout, seen: Census
) -> Iterable[tuple[str, Target]]:
    try:
        place = plan.tensor(tensor.name, tensor.shape, tensor.dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{tensor.file}: {error}") from None
    matrix = plan.facts.family.classify(tensor.name)
    if matrix is not None:
        seen.note(tensor, matrix, place)
    if layout == "padded":
        yield file, copied(tensor) if place is None else padded(tensor, place)
        return
    is_routed = matrix is not None and matrix.class_name == "routed"
    if is_routed and place is None:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name}: stored in a way that ep2tp does not know, so it cannot be sliced; use "
            "--layout padded, which leaves it as it is"
        )
    if place is None or not is_routed or place.cut is None:
        yield f"{SHARED}/{file}", copied(tensor) if place is None else padded(tensor, place)
        return
    for rank in range(plan.ranks):
        yield f"{rank_folder(rank, plan.ranks)}/{file}", of_rank(tensor, place, place.cut, rank)


def _is_aligned(items: Iterable[Item]) -> bool:
    """Whether each new tensor would begin on a multiple of its element's size, as PyTorch's reader needs."""
    at: Counter[str] = Counter()
    for origin, targets in items:
        for name, target in targets:
            if at[name] % item_bytes(origin.tensor.dtype):
                return False
            at[name] += target.size
    return True


def _headers(items: Iterable[Item], metadata: Mapping[str, str]) -> dict[str, bytes]:
    found: dict[str, list[Target]] = {}
    for _, targets in items:
        for name, target in targets:
            found.setdefault(name, []).append(target)
    headers = {}
    for name, new in found.items():
        cuts = {target.name: target.cut for target in new if target.cut}
        noted = {**metadata, CUTS: json.dumps(cuts, separators=(",", ":"))} if cuts else dict(metadata)
        headers[name] = build_header(noted, ((t.name, t.dtype, t.shape, t.size) for t in new))
    return headers


def check_outputs(jobs: Iterable[Job]) -> None:
    """Check that no two jobs write one file.

    Raises:
        CheckpointError: they do.
    """
    names = Counter(name for job in jobs for name in job.headers)
    if twice := [name for name, count in names.items() if count > 1]:
        raise CheckpointError(f"{twice[0]}: would be written twice; two of the source's files have one name")
