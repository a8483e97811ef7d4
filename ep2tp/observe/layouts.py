"""From the parallel sizes that an engine runs with to the plan they amount to."""

from __future__ import annotations

from ep2tp.observe.evidence import DEP, MIXED, TEP, TP, Reading, Strength


def vllm_layout(
    tp: int, dp: int = 1, pcp: int = 1, expert_parallel: bool = False, all2all_backend: str | None = None
) -> Reading:
    """The plan of vLLM's sizes, by the rule of ``FusedMoEParallelConfig`` (vLLM 0.25.1 to 0.33.0).

    Args:
        tp: ``tensor_parallel_size``.
        dp: ``data_parallel_size``.
        pcp: ``prefill_context_parallel_size``.
        expert_parallel: ``enable_expert_parallel``.
        all2all_backend: as resolved; ``passthrough`` stands for experts that dispatch on their own.
    """
    sizes = f"tensor parallel {tp}, data parallel {dp}, expert parallelism {'on' if expert_parallel else 'off'}"
    if tp * dp * pcp == 1:
        return Reading(f"{sizes}: one rank holds every expert whole (TP of one rank)", TP)
    if not expert_parallel:
        if dp * pcp == 1:
            return Reading(f"{sizes}: every rank holds a slice of every expert", TP)
        return Reading(f"{sizes}: experts are sliced, and tokens gathered from the data-parallel ranks", MIXED)
    if all2all_backend == "passthrough":
        return Reading(f"{sizes}, all2all 'passthrough': the experts' kernel dispatches and combines", DEP)
    if dp * pcp == 1:
        return Reading(f"{sizes}: whole experts, no dispatch; vLLM dispatches only with data parallelism", TEP)
    return Reading(f"{sizes}: whole experts, tokens are dispatched and combined", DEP)


def sglang_layout(
    tp: int, ep: int = 1, a2a_backend: str = "none", attention_dp: int = 1, moe_dp: int = 1, dwdp: int = 1
) -> Reading:
    """The plan of SGLang's sizes (0.5.17 to 0.5.23; ``moe_tp = tp // ep // moe_dp`` in ``runtime_context.py``).

    Args:
        tp: ``tp_size``.
        ep: ``ep_size``.
        a2a_backend: ``moe_a2a_backend``.
        attention_dp: data-parallel ranks of attention (``attn_dp_size``, or ``dp_size`` with ``enable_dp_attention``).
        moe_dp: ``moe_dp_size``.
        dwdp: ``dwdp_size``.
    """
    sizes = f"tp_size {tp}, ep_size {ep}, moe_a2a_backend {a2a_backend}, attention data parallel {attention_dp}"
    if a2a_backend != "none":
        return Reading(f"{sizes}: tokens are dispatched to whole experts and combined", DEP)
    if dwdp > 1:
        return Reading(f"{sizes}, dwdp_size {dwdp}: whole experts under data-parallel attention", DEP)
    if tp == 1:
        return Reading(f"{sizes}: one rank holds every expert whole (TP of one rank)", TP)
    if 1 < ep < tp // moe_dp:
        return Reading(f"{sizes}: experts are spread over {ep} groups and sliced within each", MIXED)
    if ep > 1 and attention_dp > 1:
        return Reading(f"{sizes}: whole experts, tokens are gathered for them and scattered back", DEP)
    if ep > 1:
        return Reading(f"{sizes}: whole experts, every token on every rank, no dispatch", TEP)
    if attention_dp > 1 or moe_dp > 1:
        return Reading(f"{sizes}: experts are sliced, and tokens gathered from data-parallel attention", MIXED)
    return Reading(f"{sizes}: every rank holds a slice of every expert", TP)


def vllm_worker(tags: dict[str, int]) -> Reading:
    """What a worker's name says: ``{"TP": 0, "EP": 0}`` for ``Worker_TP0_EP0``.

    vLLM adds DP, PP, PCP, TP and DCP where that size is above 1, and EP if and only if expert parallelism is on.
    """
    is_data_parallel = bool({"DP", "PCP"} & tags.keys())
    if "EP" in tags and is_data_parallel:
        return Reading("vLLM's workers carry an EP rank and a data-parallel rank: tokens are dispatched", DEP)
    if "EP" in tags:
        return Reading("vLLM's workers carry an EP rank: experts are whole", TEP | DEP)
    if is_data_parallel:
        return Reading("vLLM's workers carry a data-parallel rank and no EP rank: experts are sliced", TP | MIXED)
    return Reading("vLLM's workers carry no EP rank: expert parallelism is off", TP)


def sglang_scheduler(tags: dict[str, int]) -> Reading:
    """What a scheduler's name or log prefix says: `` TP0 EP0``; EP is there if and only if ``ep_size > 1``."""
    if "EP" in tags:
        return Reading("SGLang's ranks carry an EP rank: ep_size is above 1", TEP | DEP | MIXED)
    if {"DP", "ATTN_DP", "MOE_DP"} & tags.keys():
        return Reading("SGLang's ranks carry a DP rank and no EP rank: ep_size is 1", TP | MIXED)
    # Attention may be data parallel without a DP tag of its own, so another line has to exclude that.
    return Reading("SGLang's ranks carry no EP rank: ep_size is 1", TP, Strength.SUPPORT)
