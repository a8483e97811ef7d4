"""Takes stock of a checkpoint's MLP weights, to see what is missing before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count

from ep2tp.checkpoint.header import StoredTensor
from ep2tp.errors import CheckpointError
from ep2tp.model.families import ClassName, Matrix
from ep2tp.model.formats import WEIGHT_SUFFIXES
from ep2tp.model.sharding import ShardPlan, TensorPlan

_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?=\.)")
_COMPLETE = ({"gate", "up", "down"}, {"gate_up", "down"})

Owner = tuple[ClassName, str]
"""A class, and the part of a module's name up to its last number: one expert, or the MLP of a layer."""


class Census:
    """What has been seen of a checkpoint.

    Args:
        plan: how its MLP weights are to be sliced.
    """

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan
        self.suffixes: dict[str, frozenset[str]] = {}
        self.required: dict[str, tuple[tuple[str, ...], ...]] = {}
        self.roles: dict[Owner, frozenset[str]] = {}
        self.fused: dict[str, int] = {}  # experts of each layer that has fused ones
        self._shared: dict[frozenset[str], frozenset[str]] = {}

    def note(self, tensor: StoredTensor, matrix: Matrix, place: TensorPlan | None) -> None:
        """Count a tensor of an MLP.

        Raises:
            CheckpointError: it holds the fused weights of another number of experts than its layer does.
        """
        self.suffixes[matrix.module] = self._with(self.suffixes.get(matrix.module), matrix.suffix)
        is_weight = matrix.suffix in WEIGHT_SUFFIXES
        if matrix.is_fused and (is_weight or (place is not None and not place.component.is_replicated)):
            self._note_experts(tensor, matrix)
        if not is_weight:
            return
        if place is not None:
            self.required[matrix.module] = place.format.required
        owner = matrix.class_name, _owner(matrix.module)
        self.roles[owner] = self._with(self.roles.get(owner), matrix.role)

    def check(self) -> None:
        """Check that nothing is missing, once every tensor was noted.

        Raises:
            CheckpointError: scales, projections or experts are missing.
        """
        source = self.plan.facts.source
        for module, required in self.required.items():
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
        for (name, owner), roles in self.roles.items():
            if roles not in _COMPLETE:
                raise CheckpointError(
                    f"{source}: {owner} ({name}) has only {', '.join(sorted(roles))} of its projections; some are "
                    "missing. Fetch the checkpoint again"
                )
        self._check_experts()

    def _note_experts(self, tensor: StoredTensor, matrix: Matrix) -> None:
        layer, experts = _owner(matrix.module), tensor.shape[0] if tensor.shape else 0
        if self.fused.setdefault(layer, experts) != experts:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name}: shape {list(tensor.shape)} for {experts} experts; other tensors of "
                f"{layer} are for {self.fused[layer]}. Fetch the checkpoint again"
            )

    def _check_experts(self) -> None:
        source, experts = self.plan.facts.source, self.plan.facts.experts
        for layer, ids in self._expert_ids().items():
            expected = experts if self._is_decoder(layer) else max(ids, default=-1) + 1
            missing = expected - sum(number < expected for number in ids)
            if missing:
                first = next(number for number in count() if number not in ids)
                raise CheckpointError(
                    f"{source}: {layer} lacks {missing} of its {expected} experts, such as expert {first}; fetch the "
                    "checkpoint again"
                )
            if len(ids) > expected:
                raise CheckpointError(
                    f"{source}: {layer} has {len(ids)} experts; config.json says {expected}, so they do not belong "
                    "together"
                )

    def _expert_ids(self) -> Mapping[str, set[int]]:
        """The experts of each layer. A layer that has shared experts has routed ones."""
        found: dict[str, set[int]] = {}
        for name, owner in self.roles:
            if name == "routed" and owner not in self.fused:
                layer, number = owner[: owner.rindex(".")], int(owner[owner.rindex(".") + 1 :])
                found.setdefault(_owner(layer), set()).add(number)
            elif name == "shared":
                found.setdefault(owner, set())
        for layer, experts in self.fused.items():
            found.setdefault(layer, set()).update(range(experts))
        return found

    def _is_decoder(self, layer: str) -> bool:
        """Whether config.json counts its experts: the MTP layers of DeepSeek-V4.1 have fewer than the others."""
        *names, number = layer.split(".")
        is_draft = any(name.startswith("mtp") for name in names)
        return number.isdigit() and int(number) < self.plan.facts.layers and not is_draft

    def _with(self, before: frozenset[str] | None, name: str) -> frozenset[str]:
        """``before`` and ``name``; modules alike share one set, which keeps a large checkpoint's census small."""
        after = (before or frozenset()) | {name}
        return self._shared.setdefault(after, after)


def _owner(module: str) -> str:
    """A module's name up to its last number that stands alone.

    Example:
        >>> _owner("model.layers.3.mlp.experts.7.w1")
        'model.layers.3.mlp.experts.7'
    """
    last = max((found.end() for found in _NUMBER.finditer(module)), default=len(module))
    return module[:last]
