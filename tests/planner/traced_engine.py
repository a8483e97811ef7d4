"""One vLLM on this CPU whose ranks report their weights and every collective of a generation, from torch's profiler.

python -m tests.planner.traced_engine REQUEST.json RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ep2tp.observe.collectives import CollectiveCounter, collective_kind

EXTENSION = "tests.planner.traced_engine.TracedRank"


class TracedRank(CollectiveCounter):
    """Methods that vLLM adds to its worker class."""

    def parameter_bytes(self) -> dict[str, int]:
        """Bytes of this rank's parameters by name, as they were loaded."""
        loaded: dict[str, int] = self.model_runner.get_model().bytes_as_loaded
        return loaded

    def start_trace(self) -> None:
        """Record every operator with its shapes."""
        import torch

        self._trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
        self._trace.start()

    def stop_trace(self) -> list[tuple[str, str, Any]]:
        """(kind, operator, input shapes) of every collective."""
        self._trace.stop()
        events = self._trace.events() or []
        return [(kind, e.name, e.input_shapes) for e in events if (kind := collective_kind(e.name))]


def note_parameters_as_loaded() -> None:
    """Have each model remember its parameters' bytes before vLLM's CPU kernels pack the weights away."""
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def noting(model: Any, *arguments: Any, **keywords: Any) -> None:
        model.bytes_as_loaded = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
        process(model, *arguments, **keywords)

    base_loader.process_weights_after_loading = noting


def main() -> None:
    """Generate, and write what the ranks saw."""
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm = LLM(
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        enable_prefix_caching=False,
        worker_extension_cls=EXTENSION,
        **request["engine"],
    )
    weights = llm.collective_rpc("parameter_bytes")
    traces = []
    for tokens in request["tokens"]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [3 + i, 5, 7, 11]} for i in range(request["batch"])]
        llm.collective_rpc("start_trace")
        llm.generate(prompts, sampling, use_tqdm=False)
        traces.append(llm.collective_rpc("stop_trace"))
    Path(sys.argv[2]).write_text(json.dumps({"weights": weights, "traces": traces}), encoding="utf-8")


if __name__ == "__main__":
    main()
else:  # a worker imports the extension before it builds its model
    note_parameters_as_loaded()
