"""From a model's facts to the plan for its weights: which config fields grow, and what becomes of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm, prod

from ep2tp.errors import CheckpointError, ModelError
from ep2tp.layout.shard import Cut
from ep2tp.layout.split import Split, least_padded
from ep2tp.model.dtypes import item_bytes
from ep2tp.model.facts import ModelFacts, TensorClass
from ep2tp.model.families import ClassName, Matrix, Tensors, looks_routed
from ep2tp.model.formats import FLOAT_DTYPES, PLAIN, Component, Dim, Fill, Format

_ELEMENT = {
    "F32": b"\x00\x00\x80\x3f",
    "BF16": b"\x80\x3f",
    "F16": b"\x00\x3c",
    "F8_E4M3": b"\x38",
    "F8_E8M0": b"\x7f",
    "U8": b"\x7f",
}
_PATTERN = {
    Fill.INT4_ZERO: b"\x88",
    Fill.INT8_ZERO: b"\x80",
    Fill.INT4_POINT: b"\x77",
    Fill.INT8_POINT: b"\x7f",
}
_LARGEST_GROUP = 128  # of the groups in use (16, 32, 64, 128): slices that are multiples of it cut none


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one checkpoint tensor.

    Attributes:
        matrix: the matrix that it belongs to.
        component: which of the matrix's stored tensors it is.
        format: how the matrix is stored.
        split: the split of the class's intermediate dimension, in logical values.
        cut: the sliced axis, or None for a tensor that every rank holds whole.
    """

    matrix: Matrix
    component: Component
    format: Format
    split: Split
    cut: Cut | None

    @property
    def kind(self) -> Hashable:
        """Equal where what becomes of two of a model's tensors is equal, if their shapes and dtypes are."""
        matrix = self.matrix
        return matrix.class_name, matrix.role, matrix.suffix, matrix.is_fused, self.format.name

    @property
    def is_padded(self) -> bool:
        """Whether the tensor grows when the plan's padding is applied."""
        return self.cut is not None and not self.cut.split.is_exact

    def fill(self, dtype: str) -> bytes:
        """One element of padding in safetensors dtype ``dtype``, little-endian."""
        kind = self.component.fill
        if kind is Fill.ONE:
            return _ELEMENT[dtype]
        return _PATTERN.get(kind, b"\x00") * item_bytes(dtype)


@dataclass(frozen=True)
class ShardPlan:
    """How one model's MLP weights are sliced over ``ranks`` ranks.

    Attributes:
        facts: the model.
        ranks: tensor-parallel size.
        splits: for each class of weights, its split in logical values, over the ranks that cut it.
        fields: config fields whose value grows: (before, after).
        left_to_engine: for each class that does not divide but that the engine handles exactly, how it does.
        unchecked: for each class whose format ep2tp does not know, and whose slices might cut a group, why.
        multiples: for classes whose slices the engine's kernel takes at multiples of a size only, that size.
    """

    facts: ModelFacts
    ranks: int
    splits: Mapping[ClassName, Split]
    fields: Mapping[str, tuple[int, int]]
    left_to_engine: Mapping[ClassName, str]
    unchecked: Mapping[ClassName, str]
    multiples: Mapping[ClassName, int]

    @property
    def is_padded(self) -> bool:
        """Whether any class is padded."""
        return bool(self.fields)

    def check_found(self, found: Collection[ClassName]) -> None:
        """Check, once all of its tensors were seen, that a checkpoint had weights of those that are padded.

        It is checked where routed experts are padded, which every model has.

        Args:
            found: the classes of the tensors for which :meth:`tensor` had a plan.

        Raises:
            CheckpointError: it had none of them: they have names that the patch does not know, and would be loaded
                unpadded into a padded model.
        """
        missing = {name for name, split in self.splits.items() if not split.is_exact}
        if "routed" in missing and missing.isdisjoint(found):
            raise CheckpointError(
                f"{self.facts.source}: no tensor has a name that patch {self.facts.family.name!r} knows for "
                f"{' or '.join(sorted(missing))} weights, which have to be padded; name the right patch with "
                "EP2TP_PATCHES, or correct its names (docs/patches.md)"
            )

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> TensorPlan | None:
        """What becomes of one checkpoint tensor; None for all that is not an MLP weight.

        Args:
            name: the tensor's name in the checkpoint.
            shape: its stored shape.
            dtype: its safetensors dtype, such as ``F8_E4M3``.

        Raises:
            CheckpointError: the tensor does not fit the config: its number of axes, a size, or its dtype; or routed
                experts are padded, and the patch has no name for this one.
        """
        matrix = self.facts.family.classify(name)
        if matrix is None:
            self._refuse_unknown_expert(name)
            return None
        if matrix.class_name not in self.splits:
            return None
        stored = self._format(matrix, dtype)
        if stored is None:
            return None
        if reason := stored.refused.get(matrix.suffix):
            raise CheckpointError(f"{name}: {matrix.suffix[1:]}: {reason}; ep2tp cannot slice this checkpoint")
        component = stored.component(matrix.suffix)
        if component is None:
            if self.splits[matrix.class_name].is_exact:
                return None
            raise CheckpointError(
                f"{name}: {stored.name} has no tensor {matrix.suffix!r} that ep2tp knows of, and the "
                f"{matrix.class_name} experts have to be padded; ep2tp cannot tell how to pad this one"
            )
        if dtype not in component.dtypes:
            raise CheckpointError(
                f"{name}: dtype {dtype}; {stored.name} stores {matrix.suffix or 'the weights'} as "
                f"{' or '.join(component.dtypes)}; does quantization_config describe this checkpoint?"
            )
        cut = self._cut(name, shape, matrix, component, stored)
        return TensorPlan(matrix, component, stored, self.splits[matrix.class_name], cut)

    def is_applied_to(self, name: str, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether a tensor that the plan pads has its padded shape; arguments as of :meth:`tensor`."""
        try:
            place = self._of_padded.tensor(name, shape, dtype)
        except CheckpointError:
            return False
        return place is not None and place.cut is not None and not self.splits[place.matrix.class_name].is_exact

    @cached_property
    def _of_padded(self) -> ShardPlan:
        """The plan of a checkpoint that has the padded sizes already; asked for every tensor of an update."""
        grown = {name: Split(split.padded, split.padded, split.ranks) for name, split in self.splits.items()}
        return replace(self, splits=grown)

    def _refuse_unknown_expert(self, name: str) -> None:
        """Engines slice such a tensor unpadded into a padded model, by sizes that they round down, without a word."""
        routed = self.splits.get("routed")
        if routed is not None and not routed.is_exact and looks_routed(name):
            raise CheckpointError(
                f"{name}: patch {self.facts.family.name!r} has no such name, and routed experts have to be padded; "
                "name the right patch with EP2TP_PATCHES, or add the name to one of your own (docs/patches.md)"
            )

    def _format(self, matrix: Matrix, dtype: str) -> Format | None:
        # A module that the config calls quantised may still be stored unquantised: MTP layers of NVFP4 checkpoints are.
        if matrix.suffix in (".weight", "", ".bias", "_bias") and dtype in FLOAT_DTYPES:
            return PLAIN
        return self.facts.quantization.choose(matrix.module)

    def _cut(
        self, name: str, shape: tuple[int, ...], matrix: Matrix, component: Component, stored: Format
    ) -> Cut | None:
        if component.is_replicated:
            self._check_replicated(name, shape, matrix, component, stored)
            return None
        tensors: Tensors = getattr(self.facts.family.tensors, matrix.class_name)
        leading = 1 if matrix.is_fused else 0
        if len(shape) != component.ndim + leading:
            raise CheckpointError(
                f"{name}: shape {list(shape)} has {len(shape)} axes; {stored.name} of {self.facts.source} "
                f"needs {component.ndim + leading}; the tensor does not match its config"
            )
        rows, cols = component.rows, component.cols
        if matrix.is_fused and matrix.suffix in tensors.transposed and rows and cols:
            rows, cols = Dim(cols.axis, rows.per), Dim(rows.axis, cols.per)
        split = self.splits[matrix.class_name]
        sliced, other = (cols, rows) if matrix.role == "down" else (rows, cols)
        if other is not None:
            hidden = self.facts.expert_hidden if matrix.class_name == "routed" else self.facts.hidden
            self._check(name, shape, other, other.stored(hidden), f"hidden size {hidden}", stored)
        if sliced is None:
            return None
        axis = len(shape) + sliced.axis
        parts, times = 1, 1
        if matrix.role == "gate_up":
            parts, times = (2, 1) if tensors.order == "halves" else (1, 2)
        in_elements = Split(times * sliced.stored(split.size), times * sliced.stored(split.padded), split.ranks)
        cut = Cut(axis, in_elements, parts)
        what = f"{self.facts.tensor_class(matrix.class_name).field}={split.size}"  # type: ignore[union-attr]
        self._check(name, shape, sliced, cut.size, what, stored)
        return cut

    def _check_replicated(
        self, name: str, shape: tuple[int, ...], matrix: Matrix, component: Component, stored: Format
    ) -> None:
        """Every rank takes such a tensor whole, which is wrong for one that has a value for each row."""
        if component.fill is Fill.SHAPE:
            expected, is_right = "the two values [rows, columns]", shape == (2,)
        else:
            experts = self.facts.experts
            expected = f"one value for each of {experts} experts" if matrix.is_fused else "a single value"
            is_right = prod(shape) == 1 or (matrix.is_fused and shape[:1] == (experts,) and prod(shape) == experts)
        if not is_right:
            raise CheckpointError(
                f"{name}: shape {list(shape)}; {stored.name} stores {expected} here; does quantization_config describe "
                "this checkpoint?"
            )

    def _check(self, name: str, shape: tuple[int, ...], dim: Dim, expected: int, what: str, stored: Format) -> None:
        if shape[dim.axis] != expected:
            raise CheckpointError(
                f"{name}: shape {list(shape)}; {what} in {stored.name} ({dim.per} values an element) needs "
                f"{expected} on axis {len(shape) + dim.axis}; the tensor does not match its config"
            )


def plan_shards(
    facts: ModelFacts,
    ranks: int,
    left_to_engine: Mapping[ClassName, str] | None = None,
    dense_ranks: int | None = None,
    multiples: Mapping[ClassName, int] | None = None,
    routed_ranks: int | None = None,
) -> ShardPlan:
    """Plan the slices of every class with the least padding for equal slices of whole blocks.

    Classes that share a config field (routed and shared experts of DeepSeek) are solved together.

    Args:
        facts: the model.
        ranks: tensor-parallel size.
        left_to_engine: classes whose split the engine handles exactly although it does not divide, and how. They are
            left alone unless another class changes their config field.
        dense_ranks: ranks over which shared experts and dense MLPs are sliced, where not over all (data parallelism
            without expert parallelism slices only the routed experts over every rank).
        multiples: sizes of which a class's slices have to be multiples, besides whole blocks, for the engine's kernel.
        routed_ranks: ranks over which a routed expert is sliced, where not over all (1 where ranks hold whole experts).

    Raises:
        ModelError: a class that does not divide is stored in a format that ep2tp does not know.
    """
    handled, multiples = dict(left_to_engine or {}), dict(multiples or {})
    ranks_of = {c.name: (routed_ranks if c.name == "routed" else dense_ranks) or ranks for c in facts.classes}
    splits: dict[ClassName, Split] = {}
    fields: dict[str, tuple[int, int]] = {}
    for field in dict.fromkeys(c.field for c in facts.classes):
        classes = [c for c in facts.classes if c.field == field]
        before = classes[0].size // classes[0].times
        after = _padded_field(facts, before, classes, ranks_of, handled, multiples)
        if after != before:
            fields[field] = (before, after)
        for c in classes:
            if after != before:
                handled.pop(c.name, None)
                splits[c.name] = Split(c.size, after * c.times, ranks_of[c.name])
            elif c.name not in handled and c.size % ranks_of[c.name] == 0:
                splits[c.name] = Split(c.size, c.size, ranks_of[c.name])
    unchecked = {
        c.name: f"stored by {facts.quantization.method}, which ep2tp does not know"
        for c in facts.classes
        if not c.is_known and ranks_of[c.name] > 1 and c.size % (ranks_of[c.name] * _LARGEST_GROUP)
    }
    return ShardPlan(facts, ranks, splits, fields, handled, unchecked, multiples)


def _padded_field(
    facts: ModelFacts,
    size: int,
    classes: list[TensorClass],
    ranks_of: Mapping[ClassName, int],
    handled: Mapping[ClassName, str],
    multiples: Mapping[ClassName, int],
) -> int:
    cut = [c for c in classes if ranks_of[c.name] > 1]  # what is not cut may end in a partly filled block

    def slices(c: TensorClass, block: int) -> tuple[int, int]:
        return c.times, ranks_of[c.name] * lcm(block, multiples.get(c.name, 1))

    needs = [slices(c, c.block) if c.is_known else (c.times, ranks_of[c.name]) for c in cut if c.name not in handled]
    if least_padded(size, 1, needs) == size:
        return size
    for c in cut:
        if not c.is_known:
            raise ModelError(
                f"{facts.source}: {c.field}={size} does not divide into whole blocks over {ranks_of[c.name]} ranks, "
                f"and its weights ({c.name}) are stored by {facts.quantization.method}, which ep2tp cannot pad; use a "
                f"tensor-parallel size that divides {size}, or another quantisation of the model"
            )
    return least_padded(size, 1, [slices(c, c.padded_block) for c in classes if c.is_known])
