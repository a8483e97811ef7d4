"""A torch profiler trace (Chrome's JSON): collectives per MoE layer and per process, read as a stream."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

from ep2tp.errors import SourceError
from ep2tp.observe.collectives import collective_kind
from ep2tp.observe.evidence import Evidence, Reading, Strength
from ep2tp.observe.process import title_evidence
from ep2tp.observe.tally import Tally, in_words, plans_of

# Kernels, by what their names contain, best match first: NCCL's, the engines' own all_reduces, all-to-all libraries.
_KERNELS = (
    (re.compile(r"ncclDevKernel_AllReduce|ncclKernel_AllReduce"), "all_reduce"),
    (re.compile(r"ncclDevKernel_AllGather|ncclKernel_AllGather"), "all_gather"),
    (re.compile(r"ncclDevKernel_ReduceScatter|ncclKernel_ReduceScatter"), "reduce_scatter"),
    (re.compile(r"ncclDevKernel_SendRecv|ncclKernel_SendRecv"), "send_recv"),
    (re.compile(r"ncclDevKernel_Broadcast|ncclKernel_Broadcast"), "broadcast"),
    (re.compile(r"ncclDevKernel_Reduce|ncclKernel_Reduce"), "reduce"),
    (
        re.compile(
            r"cross_device_reduce|all_?reduce_?(?:fusion|kernel|one|two)|(?:one|two)_?shot_all_?reduce|multimem_all_reduce",
            re.I,
        ),
        "all_reduce",
    ),
    (
        re.compile(
            r"deep_ep::.*dispatch|pplx.*dispatch|EpDispatch|moeA2ADispatch|nixl_ep.*dispatch|moonep.*dispatch", re.I
        ),
        "dispatch",
    ),
    (
        re.compile(r"deep_ep::.*combine|pplx.*combine|EpCombine|moeA2ACombine|nixl_ep.*combine|moonep.*combine", re.I),
        "combine",
    ),
)
# Operators and kernels that run once in the forward pass of a MoE layer; the first that a trace holds is counted.
_LAYERS = (
    ("cpu_op", "vllm::moe_forward"),
    ("cpu_op", "_C::cpu_fused_moe"),
    ("kernel", "moe_align_block_size"),
    ("kernel", "grouped_topk"),
    ("kernel", "topkGating"),
    ("kernel", "topk_sigmoid"),
)


def read_trace(stream: IO[bytes], name: str = "trace") -> Iterator[Evidence]:
    """Evidence from one rank's trace.

    Args:
        stream: the JSON's bytes, unpacked.
        name: of the source, for errors.

    Raises:
        SourceError: the JSON is broken.
    """
    kernels, operators, layers, titles = Tally(), Tally(), {layer: 0 for _, layer in _LAYERS}, dict[str, None]()
    for event in _events(stream, name):
        words = _text(event.get("name"))
        if event.get("ph") == "M" and words == "process_name" and isinstance(event.get("args"), dict):
            titles[_text(event["args"].get("name"))] = None
        if event.get("ph") != "X":
            continue
        if event.get("cat") == "kernel":
            if kind := kernel_kind(words):
                kernels.add(kind, 0)
        elif event.get("cat") == "cpu_op" and (kind := collective_kind(words)):
            operators.add(kind, 0)
        for category, layer in _LAYERS:
            layers[layer] += layer in words and event.get("cat") == category
    for title in titles:
        yield from title_evidence(title)
    yield from _counted(kernels if kernels.kinds else operators, layers)


def kernel_kind(name: str) -> str | None:
    """The kind of collective that a GPU kernel is, or None."""
    return next((kind for pattern, kind in _KERNELS if pattern.search(name)), None)


def _counted(tally: Tally, layers: dict[str, int]) -> Iterator[Evidence]:
    counts = ", ".join(f"{count} {kind}" for kind, count in tally.kinds.most_common())
    if not counts:
        says = "no collectives in the trace: one rank, or the profiler did not record them"
        yield Evidence(Reading(says, strength=Strength.NOTE), "(no collective)")
        return
    layer, passes = next(((name, count) for name, count in layers.items() if count), ("", 0))
    if tally.kinds["send_recv"] >= passes > 0:  # a pipeline makes one or two a step, an exchange one or more a layer
        tally.kinds["all_to_all"] += tally.kinds.pop("send_recv")
    text = f"{counts}; {passes} passes through MoE layers ({layer})" if passes else counts
    if passes:
        kinds = ", ".join(f"{count / passes:.3g} {kind}" for kind, count in tally.kinds.most_common())
        says = f"per MoE layer, attention and the ends of the model included: {kinds}"
        yield Evidence(Reading(says, strength=Strength.NOTE), text)
    for reading in plans_of(tally.kinds):
        yield Evidence(reading, text)
    if step := tally.step():
        yield Evidence(Reading("one step, which the end of the trace repeats", strength=Strength.NOTE), in_words(step))


def _text(value: Any) -> str:
    """A field that should be a string; empty where a trace has anything else there."""
    return value if isinstance(value, str) else ""


def _events(stream: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The events of ``{"traceEvents": [...]}``, or of a bare list, one at a time."""
    import ijson

    start = stream.read(1)
    while start.isspace():
        start = stream.read(1)
    prefix = "item" if start == b"[" else "traceEvents.item"
    try:
        for event in ijson.items(_Rest(start, stream), prefix, use_float=True):
            if isinstance(event, dict):
                yield event
    except ijson.JSONError as error:
        raise SourceError(f"{name}: not a readable profiler trace: {str(error).splitlines()[0]}") from error


class _Rest:
    """A stream whose first byte was read already."""

    def __init__(self, start: bytes, stream: IO[bytes]) -> None:
        self._start, self._stream = start, stream

    def read(self, size: int = -1) -> bytes:
        if size == 0:  # how ijson asks for the type
            return b""
        start, self._start = self._start, b""
        return start + self._stream.read(size)
