"""Device function that joins gate and up; see :class:`ep2tp.kernels.operands.Activation`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, CLAMPED: tl.constexpr):
    """``silu(gate) * up``, or gpt-oss' clamped form. NaN stays NaN."""
    if CLAMPED:
        gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -7.0, propagate_nan=tl.PropagateNan.ALL)
        joined = gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        joined = gate / (1.0 + tl.exp(-gate)) * up
    return joined
