"""What a model's weights weigh, part by part: computed from config.json, or exact from safetensors headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ep2tp.checkpoint.header import StoredTensor
from ep2tp.model.facts import ModelFacts, TensorClass
from ep2tp.model.formats import FLOAT_DTYPES, PLAIN, Component, Dim, Format
from ep2tp.planner.attention import Attention, attention_of
from ep2tp.planner.layers import Layers, layers_of, text_part

_BYTES = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2}
_ENCODER = re.compile(  # of images, videos and sound, and what fits their output to the text model
    r"(^|\.)(visual|vision|vit|image|audio|speech|mm_projector|multi_modal_projector|patch_merge)\w*(\.|$)"
)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed|embeddings|word_embeddings|wte)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|head)\.weight$")
_MTP = re.compile(r"(^|\.)(mtp|mtp_block|nextn)\.")
_ATTENTION = re.compile(r"\.(self_attn(\.\d)?|attn|attention|linear_attn)\.")
_KEY_VALUE = re.compile(r"\.([kv]_proj|qkv_proj)\.")
_REPLICATED = re.compile(r"\.(q_a_proj|kv_a_proj\w*|wq_a|wkv|\w*indexer\w*|compressor|f_a_proj|g_a_proj|\w*norm)\b")
_ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)\.|e_score_correction_bias$|\.gate\.tid2eid$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Inventory:
    """Bytes of a model's weights, before slicing and padding. The MTP layer is not part of a sum.

    Attributes:
        expert: one routed expert of one layer.
        shared: shared experts of one MoE layer.
        dense: one dense MLP.
        sliced, kv, replicated: attention of one layer, by how it is sliced (see :class:`Attention`).
        embedding, head: input embedding and output head; no head where they are tied.
        router: router of one MoE layer; every rank holds it.
        other: all else of the text model (norms); every rank holds it.
        encoder: encoders of images and sound, with their projectors; a decode step does not read them.
        mtp: the multi-token-prediction layers, loaded only for speculative decoding.
        layers: which layers hold what.
        attention: the attention's shape.
        source: ``config.json`` or ``safetensors headers``.
    """

    expert: float
    shared: float
    dense: float
    sliced: float
    kv: float
    replicated: float
    embedding: float
    head: float
    router: float
    other: float
    encoder: float
    mtp: float
    layers: Layers
    attention: Attention
    source: str

    def total(self, facts: ModelFacts) -> float:
        """Bytes of the whole model, without MTP."""
        moe = len(self.layers.moe) * (facts.experts * self.expert + self.shared + self.router)
        attention = facts.layers * (self.sliced + self.kv + self.replicated)
        ends = self.embedding + self.head + self.other + self.encoder
        return moe + len(self.layers.dense) * self.dense + attention + ends


def matrix_bytes(stored: Format, rows: int, cols: int) -> int:
    """Bytes of one ``[rows, cols]`` matrix with its scales, as a checkpoint in this format stores it."""
    first, *rest = stored.components
    needed = [next(c for c in rest if c.suffix in suffixes) for suffixes in stored.required]
    return sum(_component_bytes(component, rows, cols) for component in (first, *needed))


def inventory_from_config(facts: ModelFacts) -> Inventory:
    """Compute the sizes from config.json alone: matrices of the text model, with scales; norms are left out."""
    layers, attention = layers_of(facts), attention_of(facts)
    middle = layers.moe[len(layers.moe) // 2]
    stored = facts.quantization.choose(_attention_module(facts, middle)) or PLAIN
    width = matrix_bytes(stored, 4096, 4096) / 4096**2
    vocabulary = (facts.vocabulary or 0) * facts.hidden * 2
    zero_experts = text_part(facts).get("zero_expert_num") or 0  # LongCat: choices of the router without weights
    gates = 1 + (text_part(facts).get("shared_expert_intermediate_size") is not None) / facts.experts
    return Inventory(
        expert=_mlp_bytes(facts, "routed", middle),
        shared=_mlp_bytes(facts, "shared", middle),
        dense=_mlp_bytes(facts, "dense", layers.dense[0] if layers.dense else 0),
        sliced=attention.sliced * width,
        kv=attention.kv * width,
        replicated=attention.replicated * width,
        embedding=vocabulary,
        head=0 if text_part(facts).get("tie_word_embeddings") else vocabulary,
        router=(facts.experts * gates + zero_experts) * facts.hidden * 2,
        other=0,
        encoder=0,
        mtp=_mtp_bytes(facts, middle, (attention.sliced + attention.kv + attention.replicated) * width),
        layers=layers,
        attention=attention,
        source="config.json",
    )


def inventory_from_tensors(facts: ModelFacts, tensors: Iterable[StoredTensor]) -> Inventory:
    """Add up the tensors that a checkpoint's headers list: exact."""
    sums: dict[str, int] = {}
    for tensor in tensors:
        part = _part_of(facts, tensor.name)
        sums[part] = sums.get(part, 0) + tensor.size
    layers, attention = layers_of(facts), attention_of(facts)

    def each(part: str, count: int) -> float:
        return sums.get(part, 0) / count if count else 0.0

    moe = len(layers.moe)
    return Inventory(
        expert=each("routed", moe * facts.experts),
        shared=each("shared", moe),
        dense=each("dense", len(layers.dense)),
        sliced=each("sliced", facts.layers),
        kv=each("kv", facts.layers),
        replicated=each("replicated", facts.layers),
        embedding=sums.get("embedding", 0),
        head=sums.get("head", 0),
        router=each("router", moe),
        other=sums.get("other", 0),
        encoder=sums.get("encoder", 0),
        mtp=sums.get("mtp", 0),
        layers=layers,
        attention=attention,
        source="safetensors headers",
    )


def _part_of(facts: ModelFacts, name: str) -> str:
    if _ENCODER.search(name):  # before all else: an encoder has layers and attention of its own
        return "encoder"
    layer = _LAYER.search(name)
    if _MTP.search(name) or (layer and int(layer[1]) >= facts.layers):
        return "mtp"
    if matrix := facts.family.classify(name):
        return matrix.class_name
    if _EMBEDDING.search(name):
        return "embedding"
    if _HEAD.search(name):
        return "head"
    if layer and _ATTENTION.search(name):
        if _REPLICATED.search(name):
            return "replicated"
        return "kv" if _KEY_VALUE.search(name) else "sliced"
    return "router" if layer and _ROUTER.search(name) else "other"


def _component_bytes(component: Component, rows: int, cols: int) -> int:
    size = _BYTES["BF16"] if component.dtypes == FLOAT_DTYPES else _BYTES.get(component.dtypes[0], 1)
    if component.suffix == "_blocks":
        size = 16
    return size * _stored(component.rows, rows) * _stored(component.cols, cols)


def _stored(dim: Dim | None, size: int) -> int:
    return 1 if dim is None else dim.stored(size)


def _mlp_bytes(facts: ModelFacts, name: str, layer: int) -> float:
    """Gate, up and down of one MLP."""
    found = next((c for c in facts.classes if c.name == name), None)
    if found is None:
        return 0.0
    hidden = facts.expert_hidden if name == "routed" else facts.hidden
    stored = _format_of(facts, found, layer)
    return 2 * matrix_bytes(stored, found.size, hidden) + matrix_bytes(stored, hidden, found.size)


def _attention_module(facts: ModelFacts, layer: int) -> str:
    """The name of an attention matrix beside the experts of a layer."""
    module = facts.family.tensors.prefixes[0] + facts.family.tensors.routed.down[0]
    before, _, after = module.partition("{layer}")
    return f"{before}{layer}.{'attn.wo_b' if after.startswith('.ffn') else 'self_attn.o_proj'}"


def _format_of(facts: ModelFacts, tensor_class: TensorClass, layer: int) -> Format:
    tensors = getattr(facts.family.tensors, tensor_class.name)
    module = tensors.down[0].replace("{layer}", str(layer)).replace("{expert}", "0")
    chosen = facts.quantization.choose(facts.family.tensors.prefixes[0] + module)
    return chosen or next((f for f in tensor_class.formats if f), PLAIN)


def _mtp_bytes(facts: ModelFacts, layer: int, attention: float) -> float:
    part = text_part(facts)
    count = part.get("num_nextn_predict_layers") or part.get("mtp_num_hidden_layers") or 0
    experts = facts.experts * _mlp_bytes(facts, "routed", layer) + _mlp_bytes(facts, "shared", layer)
    return count * (experts + attention + 2 * facts.hidden * facts.hidden * 2)
