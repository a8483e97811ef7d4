"""DeepSeek's own layout, ``model{rank}-mp{N}.safetensors``, read as the Hugging Face checkpoint it was made from.

DeepSeek-V3's ``inference/convert.py`` renames tensors, gives each of N ranks whole experts, and slices or repeats the
rest. This puts slices together again and gives tensors their published names. The converter drops the MTP layer, so
the config is told that there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ep2tp.checkpoint.header import StoredTensor, parse_json
from ep2tp.checkpoint.origin import Origin
from ep2tp.checkpoint.reader import INDEX, read_header, read_text
from ep2tp.checkpoint.source import FileTensors, LocalSource
from ep2tp.errors import CheckpointError

_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_TOP = {"embed": ("model.embed_tokens", 0), "norm": ("model.norm", None), "head": ("lm_head", 0)}
# For each module of a layer, in DeepSeek's name: the published name, and the axis that the ranks share out.
_LAYER: dict[str, tuple[str, int | None]] = {
    "attn_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "attn.wq": ("self_attn.q_proj", 0),
    "attn.wq_a": ("self_attn.q_a_proj", None),
    "attn.q_norm": ("self_attn.q_a_layernorm", None),
    "attn.wq_b": ("self_attn.q_b_proj", 0),
    "attn.wkv_a": ("self_attn.kv_a_proj_with_mqa", None),
    "attn.kv_norm": ("self_attn.kv_a_layernorm", None),
    "attn.wkv_b": ("self_attn.kv_b_proj", 0),
    "attn.wo": ("self_attn.o_proj", 1),
    **{
        f"attn.indexer.{name}": (f"self_attn.indexer.{name}", None) for name in ("wq_b", "wk", "k_norm", "weights_proj")
    },
    "ffn.gate": ("mlp.gate", None),
    **{
        f"ffn.{block}{old}": (f"mlp.{block}{new}", axis)
        for block in ("", "shared_experts.")
        for old, new, axis in (("w1", "gate_proj", 0), ("w2", "down_proj", 1), ("w3", "up_proj", 0))
    },
}
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.w([123])")
_EXPERT_NAMES = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}


def is_parts(folder: Path) -> bool:
    """Whether a folder holds this layout."""
    return not (folder / INDEX).exists() and any(_FILE.fullmatch(path.name) for path in folder.glob("*.safetensors"))


def published_name(name: str) -> tuple[str, int | None, bool]:
    """(published name, axis that the ranks share out or None, whether it belongs to a routed expert) of a tensor.

    Raises:
        CheckpointError: no such tensor is known.

    Example:
        >>> published_name("layers.3.attn.wo.scale")
        ('model.layers.3.self_attn.o_proj.weight_scale_inv', 1, False)
    """
    module, _, suffix = name.rpartition(".")
    suffix = {"scale": "weight_scale_inv"}.get(suffix, suffix)
    if module in _TOP:
        return f"{_TOP[module][0]}.{suffix}", _TOP[module][1], False
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if found:
        layer, inner = found.groups()
        if inner == "ffn.gate" and suffix == "bias":
            return f"model.layers.{layer}.mlp.gate.e_score_correction_bias", None, False
        if expert := _EXPERT.fullmatch(inner):
            where = f"model.layers.{layer}.mlp.experts.{expert[1]}"
            return f"{where}.{_EXPERT_NAMES[expert[2]]}.{suffix}", None, True
        if inner in _LAYER:
            return f"model.layers.{layer}.{_LAYER[inner][0]}.{suffix}", _LAYER[inner][1], False
    raise CheckpointError(
        f"{name}: not a name that DeepSeek's inference/convert.py writes; convert the original instead"
    )


class PartsSource:
    """A folder in DeepSeek's own layout.

    Args:
        folder: the folder.
        config: the original config.json, where the folder has none.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, config: Path | None) -> None:
        self._local = LocalSource(folder)
        self.label, self.scratch = self._local.label, self._local.scratch
        self._config = config or folder / "config.json"
        if not self._config.is_file():
            raise CheckpointError(
                f"{folder}: DeepSeek's converter does not carry config.json over; name the original's with --config"
            )

    def identity(self) -> dict[str, Any]:
        """See :meth:`ep2tp.checkpoint.source.Source.identity`."""
        return self._local.identity()

    def others(self) -> dict[str, int]:
        """See :meth:`ep2tp.checkpoint.source.Source.others`."""
        return self._local.others()

    def left_out(self) -> Iterable[str]:
        """See :meth:`ep2tp.checkpoint.source.Source.left_out`."""
        return self._local.left_out()

    def fetch(self, name: str) -> AbstractContextManager[Path]:
        """See :meth:`ep2tp.checkpoint.source.Source.fetch`."""
        return self._local.fetch(name)

    def read_text(self, name: str) -> bytes | None:
        """The folder's files; config.json says that there is no MTP layer."""
        if name != "config.json":
            return self._local.read_text(name)
        config = parse_json(self._config, read_text(self._config))
        if config.get("num_nextn_predict_layers"):
            config["num_nextn_predict_layers"] = 0
        return json.dumps(config).encode()

    def files(self) -> Sequence[FileTensors]:
        """One file of whole experts for each part, and one of all else.

        Raises:
            CheckpointError: a part is missing, or the parts do not fit together.
        """
        paths = self._paths()
        experts: list[list[Origin]] = [[] for _ in paths]
        shared: dict[str, tuple[int | None, list[StoredTensor]]] = {}
        for rank, path in enumerate(paths):
            for tensor in read_header(self._local.inside(path)).tensors:
                name, axis, is_expert = published_name(tensor.name)
                if is_expert:
                    whole = StoredTensor(name, tensor.dtype, tensor.shape, path, tensor.offset, tensor.size)
                    experts[rank].append(Origin(whole, (tensor,)))
                else:
                    shared.setdefault(name, (axis, []))[1].append(tensor)
        count = len(paths) + 1
        found: list[FileTensors] = [
            (f"model-{rank + 1:05}-of-{count:05}.safetensors", origins, {"format": "pt"})
            for rank, origins in enumerate(experts)
        ]
        joined = [_joined(name, axis, parts, len(paths)) for name, (axis, parts) in shared.items()]
        return [*found, (f"model-{count:05}-of-{count:05}.safetensors", joined, {"format": "pt"})]

    def _paths(self) -> list[Path]:
        names = {path.name: _FILE.fullmatch(path.name) for path in self._local.weight_files}
        found = {(int(match[1]), int(match[2])): name for name, match in names.items() if match}
        ranks = max(ranks for _, ranks in found)
        for rank in range(ranks):
            if (rank, ranks) not in found:
                raise CheckpointError(f"{self.label}: model{rank}-mp{ranks}.safetensors is missing; fetch it again")
        if len(found) != len(names) or len(found) != ranks:
            raise CheckpointError(f"{self.label}: holds other .safetensors files beside model*-mp{ranks}; remove them")
        return [self._local.folder / found[rank, ranks] for rank in range(ranks)]


def _joined(name: str, axis: int | None, parts: list[StoredTensor], ranks: int) -> Origin:
    first = parts[0]
    if len(parts) != ranks or any((part.dtype, part.shape) != (first.dtype, first.shape) for part in parts):
        raise CheckpointError(
            f"{first.file}: {first.name}: the {ranks} parts do not hold it alike (in {len(parts)} of them, shapes "
            f"{sorted({part.shape for part in parts})}); the checkpoint is damaged"
        )
    if axis is None or ranks == 1:
        whole = StoredTensor(name, first.dtype, first.shape, first.file, first.offset, first.size)
        return Origin(whole, (first,), copies=tuple(parts[1:]))
    if axis >= len(first.shape):
        raise CheckpointError(
            f"{first.file}: {first.name}: shape {list(first.shape)} has no axis {axis} along which the {ranks} parts "
            "could be joined; the checkpoint is damaged"
        )
    shape = tuple(size * ranks if index == axis else size for index, size in enumerate(first.shape))
    whole = StoredTensor(name, first.dtype, shape, first.file, 0, first.size * ranks)
    return Origin(whole, tuple(parts), axis)
