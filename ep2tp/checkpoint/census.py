"""Counts what a checkpoint holds of each class of MLP weights, to see what is missing before anything is written."""

from __future__ import annotations

from collections import Counter

from ep2tp.checkpoint.header import StoredTensor
from ep2tp.errors import CheckpointError
from ep2tp.model.sharding import ShardPlan

_WEIGHTS = frozenset({".weight", ".weight_packed", ".qweight", "_blocks", ""})  # suffixes of values, not of scales


class Census:
    """What has been seen of a checkpoint.

    Args:
        plan: how its MLP weights are to be sliced.
    """

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan
        self.suffixes: dict[str, set[str]] = {}
        self.roles: Counter[tuple[str, str]] = Counter()
        self.scales: dict[str, tuple[tuple[str, ...], ...]] = {}

    def note(self, tensor: StoredTensor) -> None:
        """Count a tensor."""
        matrix = self.plan.facts.family.classify(tensor.name)
        if matrix is None:
            return
        self.suffixes.setdefault(matrix.module, set()).add(matrix.suffix)
        if matrix.suffix not in _WEIGHTS:
            return
        self.roles[matrix.class_name, matrix.role] += 1
        place = self.plan.tensor(tensor.name, tensor.shape, tensor.dtype)
        if place is not None:
            self.scales[matrix.module] = place.format.required

    def check(self) -> None:
        """Check that nothing is missing, once every tensor was noted.

        Raises:
            CheckpointError: scales, projections or all experts are missing.
        """
        source = self.plan.facts.source
        for module, required in self.scales.items():
            for names in required:
                if not self.suffixes[module].intersection(names):
                    raise CheckpointError(
                        f"{source}: {module}: no {' or '.join(names)}; its weights are quantised and mean nothing "
                        "without scales. Fetch the checkpoint again"
                    )
        if not any(name == "routed" for name, _ in self.roles):
            raise CheckpointError(
                f"{source}: no tensor is named like the experts of patch {self.plan.facts.family.name!r}; the patch "
                "does not fit this checkpoint (ep2tp patches --model shows the names)"
            )
        for name in {name for name, _ in self.roles}:
            gates, ups = self.roles[name, "gate"], self.roles[name, "up"]
            downs = self.roles[name, "down"] - self.roles[name, "gate_up"]
            if not gates == ups == downs:
                raise CheckpointError(
                    f"{source}: {gates} gate, {ups} up and {downs} down projections of {name} experts; some are "
                    "missing. Fetch the checkpoint again"
                )
