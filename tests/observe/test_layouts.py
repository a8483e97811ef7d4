"""From parallel sizes to plans: vLLM's answers are compared with its own rule where it is installed."""

from __future__ import annotations

from itertools import product

import pytest

from ep2tp.observe.layouts import sglang_layout, vllm_layout
from ep2tp.observe.signs import tags


@pytest.mark.engine
@pytest.mark.parametrize(("tp", "dp", "ep"), list(product((1, 2), (1, 2), (False, True))))
def test_vllms_own_rule_dispatches_exactly_where_the_plan_says(tp: int, dp: int, ep: bool) -> None:
    config = pytest.importorskip("vllm.model_executor.layers.fused_moe.config")
    ranks = dict.fromkeys(("tp_rank", "pcp_rank", "dp_rank", "ep_rank"), 0)
    uses_ep = ep and tp * dp > 1
    parallel = config.FusedMoEParallelConfig(
        **ranks,
        tp_size=tp,
        pcp_size=1,
        dp_size=dp,
        sp_size=1,
        ep_size=tp * dp if uses_ep else 1,
        use_ep=uses_ep,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    [plan] = vllm_layout(tp, dp, 1, ep).plans
    assert parallel.use_all2all_kernels == (plan == "DEP")
    assert parallel.use_ep == (plan in ("TEP", "DEP"))


@pytest.mark.parametrize(
    ("sizes", "plan"),
    [
        ((8,), "TP"),
        ((8, 8), "TEP"),
        ((8, 2), "mixed"),
        ((8, 8, "deepep"), "DEP"),
        ((8, 8, "none", 8), "DEP"),
        ((1,), "TP"),
    ],
)
def test_sglang(sizes: tuple[int, ...], plan: str) -> None:
    assert sglang_layout(*sizes).plans == {plan}  # type: ignore[arg-type]


def test_tags_of_both_engines() -> None:
    assert tags("_DP1_TP0_DCP3_EP10") == {"DP": 1, "TP": 0, "DCP": 3, "EP": 10}
    assert tags(" DP0 ATTN_CP1 MOE_DP2 TP3 EP4") == {"DP": 0, "ATTN_CP": 1, "MOE_DP": 2, "TP": 3, "EP": 4}
