"""Makes the jobs of a conversion: what of each tensor's bytes goes where. Reads nothing but what headers say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from ep2tp.checkpoint.census import Census
from ep2tp.checkpoint.conversion import SHARED, Item, Job, Layout, Recipe, rank_folder
from ep2tp.checkpoint.header import StoredTensor
from ep2tp.checkpoint.origin import Origin
from ep2tp.checkpoint.runs import copied, of_rank, padded
from ep2tp.errors import CheckpointError
from ep2tp.model.dtypes import item_bytes
from ep2tp.model.sharding import ShardPlan, TensorPlan


def plan_jobs(
    files: Iterable[tuple[str, Sequence[Origin], Mapping[str, str]]], plan: ShardPlan, layout: Layout
) -> tuple[Job, ...]:
    """Plan the output of each of the source's files.

    Args:
        files: (name, tensors in the order of their data, metadata).

    Raises:
        CheckpointError: a tensor does not fit the plan, or scales or experts are missing.
    """
    recipes = _Recipes(plan, layout)
    jobs = []
    for name, origins, metadata in files:
        items = [(origin, recipes.of(origin.tensor)) for origin in origins]
        if not _is_aligned(items):
            items.sort(key=lambda item: -item_bytes(item[0].tensor.dtype))
        inputs = tuple(dict.fromkeys(part.file.name for origin in origins for part in (*origin.parts, *origin.copies)))
        whole = name if layout == "padded" else f"{SHARED}/{name}"
        slices = tuple(f"{rank_folder(rank, plan.ranks)}/{name}" for rank in range(plan.ranks))
        jobs.append(Job(inputs, tuple(items), whole, slices, metadata))
    recipes.census.check()
    return tuple(job for job in jobs if job.items)


def check_outputs(names: Iterable[str]) -> None:
    """Check that all files of the new checkpoint can lie side by side.

    Args:
        names: the files' names, relative to its folder.

    Raises:
        CheckpointError: two have one name, one has the name of another's folder, or a name is not UTF-8.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(f"{name}: would be written twice; two of the source's files have one name")
        if not _is_utf8(name):
            raise CheckpointError(f"{name!r}: the source has a file whose name is not UTF-8; rename or remove it")
        seen.add(name)
    for name in sorted(seen):
        folders = [str(folder) for folder in PurePosixPath(name).parents]
        if taken := seen.intersection(folders):
            raise CheckpointError(
                f"{taken.pop()}: the source has a file of this name, and {name} needs a folder of this name; rename or "
                "remove the source's"
            )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python stands in for the bytes with lone surrogates
        return False
    return True


class _Recipes:
    """Finds what becomes of each tensor. Large models have 10^5 tensors of a few kinds: each kind has one recipe."""

    def __init__(self, plan: ShardPlan, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.census = Census(plan)
        self._made: dict[object, Recipe] = {}

    def of(self, tensor: StoredTensor) -> Recipe:
        """The recipe of a tensor.

        Raises:
            CheckpointError: it does not fit the plan.
        """
        try:
            place = self.plan.tensor(tensor.name, tensor.shape, tensor.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{tensor.file}: {error}") from None
        matrix = place.matrix if place else self.plan.facts.family.classify(tensor.name)
        if matrix is not None:
            self.census.note(tensor, matrix, place)
        is_routed = matrix is not None and matrix.class_name == "routed"
        if self.layout == "ranks" and is_routed and place is None:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name}: stored in a way that ep2tp does not know, so it cannot be sliced; use "
                "--layout padded, which leaves it as it is"
            )
        kind = tensor.dtype, tensor.shape, place.kind if place else None
        if kind not in self._made:
            self._made[kind] = self._recipe(tensor, place, is_routed)
        return self._made[kind]

    def _recipe(self, tensor: StoredTensor, place: TensorPlan | None, is_routed: bool) -> Recipe:
        if place is None:
            return Recipe((copied(tensor),))
        if self.layout == "padded" or not is_routed or place.cut is None:
            return Recipe((padded(tensor, place),))
        ranks = range(self.plan.ranks)
        return Recipe(tuple(of_rank(tensor, place, place.cut, rank) for rank in ranks), is_sliced=True)


def _is_aligned(items: Iterable[Item]) -> bool:
    """Whether each new tensor would begin on a multiple of its element's size, as PyTorch's reader needs."""
    at: Counter[bool] = Counter()  # all ranks' files are alike
    for origin, recipe in items:
        if at[recipe.is_sliced] % item_bytes(origin.tensor.dtype):
            return False
        at[recipe.is_sliced] += recipe.targets[0].size
    return True
