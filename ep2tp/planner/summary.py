"""The comparison as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ep2tp.planner.advise import Verdict
from ep2tp.planner.communication import Collective, sent_bytes
from ep2tp.planner.compare import Assessment, Question
from ep2tp.planner.divisibility import kv_copies
from ep2tp.planner.memory import GB, usable_bytes
from ep2tp.planner.timing import Step

LABEL = "computed: a bound, see docs/planning.md"


def summary(question: Question, assessed: Sequence[Assessment], verdict: Verdict) -> dict[str, Any]:
    """One JSON object: the model, the machine, every plan, the verdict. GB are 1e9 bytes; batch sizes are strings."""
    return {
        "model": _model(question),
        "machine": {
            "gpus": question.gpus,
            "gpu": question.gpu.name,
            "gpu_source": question.gpu.source,
            "memory_gb": question.gpu.memory_gb,
            "usable_gb": round(usable_bytes(question.gpu.memory_gb) / GB, 3),
            "memory_bandwidth_gb_s": question.gpu.bandwidth / GB,
            "link": question.link.name,
            "link_source": question.link.label,
        },
        "context": question.context,
        "label": LABEL,
        "memory_view": memory_view(question, assessed),
        "plans": [_plan(question, a) for a in assessed],
        "verdict": _verdict(verdict),
    }


def memory_view(question: Question, assessed: Sequence[Assessment]) -> dict[str, float]:
    """GB of weights a GPU when experts are sliced, spread, both, or every GPU has the whole model.

    "Replicated experts" of other texts, where every GPU has all experts but a slice of each, are TP=N.
    """
    names = {"TP": "TP=N", "DEP": "EP=N"}
    view = {names[a.layout.plan]: a.weights.total / GB for a in assessed if a.layout.plan in names}
    view |= {f"TPxEP {a.layout.tp}x{a.layout.ep}": a.weights.total / GB for a in assessed if a.layout.plan == "TPxEP"}
    view["replicated experts, a slice of each"] = view["TP=N"]
    view["whole model"] = question.inventory.total(question.facts) / GB
    return {name: round(size, 3) for name, size in view.items()}


def _model(question: Question) -> dict[str, Any]:
    facts, inventory = question.facts, question.inventory
    return {
        "source": facts.source,
        "family": facts.family.name,
        "experts": facts.experts,
        "top_k": facts.top_k,
        "hidden": facts.hidden,
        "layers": facts.layers,
        "moe_layers": len(inventory.layers.moe),
        "formats": {c.name: c.format_names for c in facts.classes},
        "weights_gb": round(inventory.total(facts) / GB, 3),
        "mtp_gb": round(inventory.mtp / GB, 3),
        "sizes_from": inventory.source,
        "attention_is_estimate": inventory.attention.is_estimate and inventory.source == "config.json",
    }


def _plan(question: Question, a: Assessment) -> dict[str, Any]:
    return _figures(question, a) | {"in_vllm": _figures(question, a.in_vllm) if a.in_vllm else None}


def _figures(question: Question, a: Assessment) -> dict[str, Any]:
    w = a.weights
    parts = ("routed", "shared", "dense", "attention", "embeddings", "other", "encoder", "padding")
    return {
        "plan": a.layout.plan,
        "tp": a.layout.tp,
        "ep": a.layout.ep,
        "dp": a.layout.dp,
        "pp": a.layout.pp,
        "fits": a.fits,
        "divides": a.divides,
        "runs_with_ep2tp": a.runs,
        "weights_gb_per_gpu": round(w.total / GB, 3),
        "weights_gb_by_part": {part: round(getattr(w, part) / GB, 3) for part in parts},
        "padding_percent": round(100 * w.padding_share, 2),
        "kv_cache_gb_per_sequence": round(a.cache / GB, 4),
        "kv_cache_copies": kv_copies(question.facts, a.layout),
        "left_gb_per_gpu": round((usable_bytes(question.gpu.memory_gb) - w.total) / GB, 3),
        "sequences_that_fit": max(0, a.sequences),
        "batches_that_fit": [str(b) for b in a.decode if a.holds(b)],
        "straggler": {str(b): round(factor, 3) for b, factor in a.straggler.items()},
        "comm_bytes_per_layer_per_rank": _by_batch(a.collectives, lambda found: round(sent_bytes(found))),
        "collectives_per_layer": _by_batch(a.collectives, _collectives),
        "all_to_all_bytes_per_layer_per_rank": _by_batch(a.alternative, lambda found: round(sent_bytes(found))),
        "decode_ms": _by_batch(a.decode, lambda step: round(step.total, 4)),
        "decode_ms_by_part": _by_batch(a.decode, _step),
        "tokens_per_second": {str(b): round(1e3 * b / step.total, 1) for b, step in a.decode.items()},
        "prefill_ms": {str(question.prompt): round(a.prefill.total, 3)},
        "prefill_ms_by_part": {str(question.prompt): _step(a.prefill)},
        "blockers": list(a.blockers),
        "padded_fields": {field: list(sizes) for field, sizes in (a.plan.fields if a.plan else {}).items()},
        "padded_in": list(a.padded_in),
        "stock_engines": [vars(behaviour) for behaviour in a.stock],
    }


def _by_batch(values: Mapping[int, Any], show: Callable[[Any], Any]) -> dict[str, Any]:
    return {str(batch): show(value) for batch, value in values.items()}


def _collectives(found: Sequence[Collective]) -> list[dict[str, Any]]:
    return [{"kind": c.kind, "ranks": c.ranks, "bytes_sent": round(c.sent), "carries": c.what} for c in found]


def _step(step: Step) -> dict[str, float]:
    return {part: round(getattr(step, part), 4) for part in Step.__dataclass_fields__}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "plan": None,
        **(_sizes(verdict.best) or {}),
        "by_batch": _named(verdict.by_batch),
        "by_batch_in_vllm": _named(verdict.by_batch_in_vllm),
        "by_engine": {engine: _sizes(best) for engine, best in verdict.by_engine.items()},
        "ep_is_better": verdict.ep_is_better,
        "ep_is_unavoidable": verdict.ep_is_unavoidable,
        "reasons": list(verdict.reasons),
        "commands": {engine: str(launch) for engine, launch in verdict.commands.items()},
        "notes": {engine: launch.note for engine, launch in verdict.commands.items() if launch.note},
    }


def _named(by_batch: Mapping[int, Assessment | None]) -> dict[str, str | None]:
    return {str(batch): str(a.layout) if a else None for batch, a in by_batch.items()}


def _sizes(best: Assessment | None) -> dict[str, Any] | None:
    return None if best is None else {key: getattr(best.layout, key) for key in ("plan", "tp", "ep", "dp", "pp")}
