"""ep2tp's kernel beside stock vLLM's Triton experts, and two ceilings, all measured in one run.

``kernel_table.py --out FOLDER [--shapes A,B] [--seconds 200]`` needs a GPU; without vLLM its columns stay empty. Tiles
come from ep2tp's tables. For each shape and number of tokens both results
are first compared with float64 on fresh inputs, then timed under CUDA graphs with cold caches. ``--plot table.json``
draws the roofline from the results, on any machine (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
MOST_CHECKED = 64  # tokens; float64 is slow


def stock_call(gate_up: Any, down: Any) -> Callable[..., Any] | None:
    """vLLM's fused_experts on these weights; None where vLLM is absent or its kernel has no such format."""
    try:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.fused_moe import fused_experts
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    except ImportError:
        return None
    config = None
    if gate_up.format.kind == "fp8":
        block = list(gate_up.format.block)
        config = fp8_w8a8_moe_quant_config(w1_scale=gate_up.scales, w2_scale=down.scales, block_shape=block)
    elif gate_up.format.kind != "bf16":
        return None

    engine = VllmConfig()

    def call(x: Any, topk_weights: Any, topk_ids: Any) -> Any:
        with set_current_vllm_config(engine):
            return fused_experts(x, gate_up.values, down.values, topk_weights, topk_ids, quant_config=config)

    return call


def measure(call: Callable[..., Any], batches: list[Any], reference: Any, checked: Any) -> dict[str, float | None]:
    """Error against float64, and the median and spread of a call's seconds."""
    from tests.benchmarks.kernel_timing import seconds_a_call
    from tests.kernels.layers import relative_error

    result = call(checked.x, checked.topk_weights, checked.topk_ids)
    error = None if reference is None else relative_error(result, reference)
    times = seconds_a_call([lambda b=b: call(b.x, b.topk_weights, b.topk_ids) for b in batches])
    return {"error": error, "seconds": statistics.median(times), "least": times[0], "most": times[-1]}


def measure_shape(
    shape: Any, chosen: argparse.Namespace, header: dict[str, Any], deadline: float
) -> list[dict[str, Any]]:
    """One line a number of tokens."""
    from ep2tp.kernels.configs import choose, to_json
    from ep2tp.kernels.fused_moe import fused_moe
    from ep2tp.kernels.reference import fused_moe_reference
    from tests.benchmarks.kernel_timing import bytes_read, make_batches, make_layer

    gate_up, down = make_layer(shape)
    stock = stock_call(gate_up, down)
    lines = []
    for tokens in TOKENS:
        if time.monotonic() > deadline:
            break
        batches = make_batches(shape, tokens)
        checked = make_batches(shape, tokens, seed=time.monotonic_ns() % 2**31)[0]
        reference = None
        if tokens <= MOST_CHECKED:
            reference = fused_moe_reference(checked.x, gate_up, down, checked.topk_weights, checked.topk_ids)
        line: dict[str, Any] = {
            "shape": shape.name, "tokens": tokens, "bytes": bytes_read(gate_up, down, batches),
            "operations": 6 * tokens * shape.top_k * shape.hidden * shape.inner,
        }  # fmt: skip
        config = choose(header["device"], shape.key, shape.format, tokens)
        if config is not None:

            def ours(x: Any, topk_weights: Any, topk_ids: Any, config: Any = config) -> Any:
                return fused_moe(x, gate_up, down, topk_weights, topk_ids, config=config)

            line["ep2tp"] = {**measure(ours, batches, reference, checked), "config": to_json(config)}
        if stock is not None:
            try:
                line["vllm"] = measure(stock, batches, reference, checked)
            except Exception as problem:  # a shape that stock vLLM does not run is a result
                line["vllm"] = {"failure": f"{type(problem).__name__}: {problem}"[:200]}
        lines.append(line)
        print_line(line, header)
    return lines


def print_line(line: dict[str, Any], header: dict[str, Any]) -> None:
    """Errors first, then times and shares of the nearer ceiling."""
    floor = max(line["bytes"] / header["copy_bytes_per_s"], line["operations"] / header["dense_flops"])

    def cells(name: str) -> str:
        found = line.get(name, {})
        if "seconds" not in found:
            return f"{found.get('failure', '')} | | "
        error = "" if found["error"] is None else f"{found['error']:.1e}"
        return f"{error} | {found['seconds'] * 1e6:.1f} | {floor / found['seconds']:.0%}"

    print(f"{line['shape']} | {line['tokens']} | {cells('ep2tp')} | {cells('vllm')}", flush=True)


def plot(path: Path) -> None:
    """How much of the roofline each kernel reaches, by number of tokens; a panel for each shape."""
    from matplotlib.figure import Figure

    found = json.loads(path.read_text())
    copy, dense = found["copy_bytes_per_s"], found["dense_flops"]
    shapes = list(dict.fromkeys(line["shape"] for line in found["lines"]))
    rows = -(-len(shapes) // 4)
    figure = Figure(figsize=(11, 0.9 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False).flat
    for unused in list(panels)[len(shapes) :]:
        unused.set_visible(False)
    for axes, shape in zip(figure.axes, shapes, strict=False):
        for name, color in (("vllm", "#dd8452"), ("ep2tp", "#4c72b0")):
            lines = [r for r in found["lines"] if r["shape"] == shape and "seconds" in r.get(name, {})]
            roofs = [max(line["bytes"] / copy, line["operations"] / dense) for line in lines]
            shares = [100 * roof / line[name]["seconds"] for roof, line in zip(roofs, lines, strict=True)]
            axes.plot([line["tokens"] for line in lines], shares, "o-", markersize=4, color=color, label=name)
        axes.set(xscale="log", ylim=(0, 105), title=shape)
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens", fontsize=10)
    figure.supylabel("% of the roofline", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=10)
    roof = f"copy {copy / 1e12:.2f} TB/s, dense {dense / 1e12:.0f} TFLOP/s"
    figure.suptitle(f"MoE layer of one rank, {found['device']}; roofline: {roof}", fontsize=11, x=0.4)
    figure.savefig(path.with_suffix(".png"), dpi=100)
    print(path.with_suffix(".png"))


def main() -> None:
    """Measure, or plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("table"))
    parser.add_argument("--shapes", help="only these, comma-separated")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--plot", type=Path, help="draw this table.json, and stop")
    chosen = parser.parse_args()
    if chosen.plot:
        plot(chosen.plot)
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    import triton

    from tests.benchmarks.kernel_timing import SHAPES, copy_bandwidth, dense_flops

    deadline = time.monotonic() + chosen.seconds
    header: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_bytes_per_s": copy_bandwidth(), "dense_flops": dense_flops(),
    }  # fmt: skip
    print(header)
    print("shape | M | ep2tp: error | µs | share of ceiling | vLLM: error | µs | share of ceiling")
    names = chosen.shapes.split(",") if chosen.shapes else list(SHAPES)
    lines: list[dict[str, Any]] = []
    for name in names:
        if time.monotonic() < deadline:
            lines += measure_shape(SHAPES[name], chosen, header, deadline)
            torch.cuda.empty_cache()
            chosen.out.mkdir(parents=True, exist_ok=True)
            (chosen.out / "table.json").write_text(json.dumps({**header, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
