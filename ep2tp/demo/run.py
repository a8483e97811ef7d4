"""``ep2tp demo``: the main job on a built-in tiny model, on a real engine on this CPU, checked as it goes."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from ep2tp.demo.engines import ENGINES, DemoEngine
from ep2tp.demo.launch import PROMPTS, EngineRun, run_engine
from ep2tp.demo.tiny import TinyModel
from ep2tp.errors import Ep2tpError

# 75 does not divide over 2 ranks; all the rest does. float32, so that the order of summation cannot change a token.
MODEL = TinyModel(expert_size=75, shared_experts=2, dense_size=324)


def run_demo(engine: str, ranks: int, keep: Path | None) -> int:
    """Run the demo; returns 0 if tokens and collectives are as claimed, else 1.

    Args:
        engine: ``vllm`` or ``sglang``.
        ranks: tensor-parallel size of the rewritten launch.
        keep: folder for the checkpoint and the logs; a temporary one where None.
    """
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        return _Demo(ENGINES[engine], keep, ranks).run()
    with tempfile.TemporaryDirectory(prefix="ep2tp-demo-") as folder:
        return _Demo(ENGINES[engine], Path(folder), ranks).run()


class _Demo:
    def __init__(self, engine: DemoEngine, folder: Path, ranks: int) -> None:
        self.engine, self.folder, self.ranks = engine, folder, ranks
        self.console = Console(highlight=False)
        self.options: dict[str, Any] = {engine.model_argument: str(folder / "model"), "dtype": "float32"}

    def run(self) -> int:
        """All steps in order."""
        _require(self.engine)
        MODEL.write(self.folder / "model", "float32")
        self.console.print(
            f"A tiny DeepSeek-V3: {MODEL.experts} experts, top {MODEL.top_k}, moe_intermediate_size "
            f"{MODEL.expert_size}, {MODEL.shared_experts} shared experts, a dense first layer of {MODEL.dense_size}, "
            f"MLA; in {self.folder}"
        )
        tensor_parallel, recipe = self.engine.tensor_parallel(self.ranks), self.engine.recipe(self.ranks)
        tp_flags, flags = (self.engine.flags_of(options) for options in (tensor_parallel, recipe))
        reference = self._step("1/4 reference: one rank", "reference", {}, "off")
        self._step(f"2/4 {tp_flags}, EP2TP=off", "stock-tp", tensor_parallel, "off")
        stock = self._step(f"3/4 {flags}, EP2TP=off", "stock-ep", recipe, "off")
        rewritten = self._step(f"4/4 {flags}, EP2TP=on", "rewritten", recipe, "on")
        return self._report(reference, stock, rewritten)

    def _step(self, title: str, name: str, options: dict[str, Any], mode: str) -> EngineRun:
        if not self.console.is_terminal:
            self.console.print(f"{title} (about 30 s) ...", soft_wrap=True)
        with self.console.status(f"{title} (about 30 s)"):
            run = run_engine(self.folder, name, self.options | options, mode, self.engine)
        outcome = "ran" if run.result else f"failed: {run.failure}"
        self.console.print(f"{title}: {outcome} ({run.seconds:.0f} s)", soft_wrap=True)
        return run

    def _report(self, reference: EngineRun, stock: EngineRun, rewritten: EngineRun) -> int:
        if reference.result is None or rewritten.result is None:
            failed = reference if reference.result is None else rewritten
            self.console.print(f"\n{failed.log[-4000:]}\n[bold]FAILED[/]: {failed.failure}", markup=True)
            return 1
        self.console.print(f"\nWhat ep2tp wrote to {self.engine.title}'s log:")
        for line in rewritten.ep2tp_lines:
            self.console.print(f"  {line}", soft_wrap=True, markup=False)
        same_tokens = self._compare_tokens(reference, stock, rewritten)
        only_all_reduce = self._check_collectives(rewritten)
        self.console.print("\n[bold]OK[/]" if same_tokens and only_all_reduce else "\n[bold]FAILED[/]")
        return 0 if same_tokens and only_all_reduce else 1

    def _compare_tokens(self, reference: EngineRun, stock: EngineRun, rewritten: EngineRun) -> bool:
        assert reference.result and rewritten.result
        for i, prompt in enumerate(PROMPTS):
            self.console.print(f"\nprompt {prompt}")
            self.console.print(f"  one rank           {reference.result['tokens'][i]}", soft_wrap=True)
            shown = stock.result["tokens"][i] if stock.result else "(failed, see above)"
            self.console.print(f"  expert parallel    {shown}")
            self.console.print(f"  rewritten, TP {self.ranks}    {rewritten.result['tokens'][i]}", soft_wrap=True)
        same = bool(reference.result["tokens"] == rewritten.result["tokens"])
        self.console.print(f"\nTokens of one rank and of the rewritten launch: {'equal' if same else 'DIFFERENT'}")
        return same

    def _check_collectives(self, rewritten: EngineRun) -> bool:
        assert rewritten.result
        as_claimed = True
        for rank, counts in enumerate(rewritten.result["collectives"]):
            passes, inside = counts["layers"], counts["inside"]
            share = ", ".join(f"{n / passes:g} {kind}" for kind, n in inside.items()) if passes else "nothing seen"
            self.console.print(f"Collectives of rank {rank}: {share} per {self.engine.counted} ({passes} counted)")
            as_claimed &= passes > 0 and inside == {"all_reduce": passes * self.engine.all_reduces(MODEL.layers)}
        return as_claimed


def _require(engine: DemoEngine) -> None:
    package = engine.title.lower()
    if importlib.util.find_spec(package) is None:
        raise Ep2tpError(f"the demo runs a real {engine.title}, which is not installed here; see the README")
