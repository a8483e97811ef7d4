"""A conversion, planned: which files come of which, and what of each tensor's bytes goes where. Reads headers only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ep2tp.checkpoint.header import build_header
from ep2tp.checkpoint.origin import Origin
from ep2tp.checkpoint.runs import Target
from ep2tp.model.sharding import ShardPlan

Layout = Literal["padded", "ranks"]
SHARED = "shared"
CUTS = "ep2tp.cuts"
"""In ``__metadata__`` of a rank file: for each slice, JSON of its (axis, parts)."""


@dataclass(frozen=True)
class Recipe:
    """What becomes of a tensor. Tensors of one kind share it.

    Attributes:
        targets: the new tensors: one that is whole, or each rank's slice.
        is_sliced: whether they are slices.
    """

    targets: tuple[Target, ...]
    is_sliced: bool = False

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that it says."""
        return hashlib.sha256(repr(self.targets).encode()).digest()


Item = tuple[Origin, Recipe]


@dataclass(frozen=True)
class Job:
    """One run over the source.

    Attributes:
        inputs: the source's files that it reads; where there are several, other jobs read (and hash) them whole.
        items: each tensor of the source, and what becomes of it, in the order of the data.
        whole: the output file of whole tensors.
        slices: the output file of each rank's slices.
        metadata: ``__metadata__`` of the output files.
    """

    inputs: tuple[str, ...]
    items: tuple[Item, ...]
    whole: str
    slices: tuple[str, ...]
    metadata: Mapping[str, str]

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The output files that anything goes into."""
        has = {recipe.is_sliced for _, recipe in self.items}
        return (*((self.whole,) if False in has else ()), *(self.slices if True in has else ()))

    def targets(self, recipe: Recipe) -> Iterable[tuple[str, Target]]:
        """(output file, new tensor) of each tensor made by a recipe."""
        return zip(self.slices if recipe.is_sliced else (self.whole,), recipe.targets, strict=True)

    @property
    def headers(self) -> dict[str, bytes]:
        """For each output file, all that comes before its data. Built anew each time, as they are large."""
        built = {is_sliced: self._header(is_sliced) for is_sliced in {recipe.is_sliced for _, recipe in self.items}}
        return {name: built[name != self.whole] for name in self.outputs}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each output file."""
        data = Counter[bool]()
        for _, recipe in self.items:
            data[recipe.is_sliced] += recipe.targets[0].size
        return {name: len(header) + data[name != self.whole] for name, header in self.headers.items()}

    @property
    def is_unchanged(self) -> bool:
        """Whether its only output is its only input: the same name, and every tensor a copy."""
        is_one_file = self.inputs == self.outputs and len(self.inputs) == 1
        return is_one_file and all(target.is_copy for _, recipe in self.items for target in recipe.targets)

    def _header(self, is_sliced: bool) -> bytes:
        """All ranks' files have the same, as slices are equal."""
        new = [(origin.tensor, recipe.targets[0]) for origin, recipe in self.items if recipe.is_sliced == is_sliced]
        cuts = {tensor.name: target.cut for tensor, target in new if target.cut}
        noted = {**self.metadata, CUTS: json.dumps(cuts, separators=(",", ":"))} if cuts else dict(self.metadata)
        return build_header(noted, ((tensor.name, t.dtype, t.shape, t.size) for tensor, t in new))


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
        texts: SHA-256 of the source's config.json and index, which are written anew.
        left_out: weights of the source that the new checkpoint will not have: those that the index does not name, in
            other formats, or in folders of their own.
    """

    plan: ShardPlan
    layout: Layout
    jobs: tuple[Job, ...]
    config: bytes
    index: bytes | None
    others: Mapping[str, int]
    identity: Mapping[str, Any]
    texts: Mapping[str, str]
    left_out: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Bytes of each weight file to write."""
        return {name: size for job in self.jobs for name, size in job.sizes.items()}

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
        source = {key: value for key, value in self.identity.items() if key != "path"}  # machines mount it elsewhere
        what = [source, self.layout, self.plan.ranks, self.config.decode(), self.others]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
        for job in self.jobs:
            digest.update(repr(job.outputs).encode())
            for header in dict.fromkeys(job.headers.values()):  # that of all ranks once
                digest.update(header)
            for _, recipe in job.items:
                digest.update(recipe.digest)
        return digest.hexdigest()


def part_of(output: str) -> str:
    """The part of the work that an output file belongs to: ``shared``, ``rank-3-of-8``, or ``all``."""
    return output.rpartition("/")[0] or "all"


def rank_folder(rank: int, ranks: int) -> str:
    """The folder of one rank's slices."""
    return f"rank-{rank}-of-{ranks}"
