"""Records what vLLM 0.25.1 and SGLang 0.5.17 write on two GPUs, for the tests of the detector: within 3 minutes.

    PYTHONPATH=REPO python3 tests/gpu/record_logs.py OUT [--vllm PATH:PATH] [--sglang PATH:PATH]

PATHs are put before the engine's own ``PYTHONPATH``; an engine that is not named is not recorded. All launches run side
by side on both GPUs. OUT gets trimmed logs (with NCCL's COLL lines) and traces, a few hundred KB, to be copied to
``tests/data/logs``; whole ones stay in OUT.whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ep2tp.demo.launch import run_logged
from ep2tp.demo.tiny import TinyModel
from tests.observe import trim

LIMIT_S = 175
_MOE: dict[str, Any] = {"heads": 16, "kv_heads": 4, "experts": 16, "top_k": 4, "expert_size": 128, "vocabulary": 1024}
MODELS = {"vllm": TinyModel("qwen3_moe", **_MOE), "sglang": TinyModel("glm4_moe", dense_size=512, **_MOE)}
_TP2: dict[str, Any] = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
_EP: dict[str, Any] = {"enable_expert_parallel": True}
RECORDINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vllm-0.25.1-gpu-tp2": ("vllm", _TP2, "off"),
    "vllm-0.25.1-gpu-tep2": ("vllm", _TP2 | _EP, "off"),
    "vllm-0.25.1-gpu-tep2-rewritten": ("vllm", _TP2 | _EP, "on"),
    "vllm-0.25.1-gpu-dep2": ("vllm", {"data_parallel_size": 2} | _EP, "off"),
    "sglang-0.5.17-gpu-tp2": ("sglang", {"tp_size": 2, "port": 30000}, "off"),
    "sglang-0.5.17-gpu-tep2": ("sglang", {"tp_size": 2, "ep_size": 2, "port": 31000}, "off"),
}
_VLLM: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 27,
    "moe_backend": "triton",
}
_SGLANG: dict[str, Any] = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "disable_custom_all_reduce": True,
    "enforce_disable_flashinfer_allreduce_fusion": True,
    "skip_tokenizer_init": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 4096,
    "max_running_requests": 4,
    "context_length": 256,
    "log_level": "info",
}
# NVLink multicast stays off: on shared hosts it can put GPUs out of service.
_ENVIRONMENT = {
    "NCCL_DEBUG": "INFO",
    "NCCL_DEBUG_SUBSYS": "COLL",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2": "0",
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
}
PROMPT, TOKENS = [3, 5, 7, 11, 13], 6


def record(name: str, whole: Path, paths: dict[str, str]) -> tuple[str, int, float]:
    """Run one engine; its output goes to ``NAME.log``, its traces to ``NAME.traces``. Returns status and seconds."""
    engine, arguments, mode = RECORDINGS[name]
    traces = (whole / f"{name}.traces").resolve()
    traces.mkdir()
    request = {"engine": engine, "model": str(whole / engine), "traces": str(traces), "arguments": arguments}
    python_path = os.pathsep.join([*paths[engine].split(":"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | _ENVIRONMENT | {"EP2TP": mode, "PYTHONPATH": python_path}
    started = time.monotonic()
    command = [sys.executable, __file__, "--run", json.dumps(request)]
    status = run_logged(command, environment, whole / f"{name}.log", LIMIT_S)
    return name, status, time.monotonic() - started


def _run(request: dict[str, Any]) -> None:
    if request["engine"] == "sglang":
        _run_sglang(request)
    elif request["arguments"].get("data_parallel_size", 1) > 1:
        _serve_vllm(request)
    else:
        _run_vllm(request)


def _vllm_arguments(request: dict[str, Any]) -> dict[str, Any]:
    from vllm.config.profiler import ProfilerConfig

    profiler = ProfilerConfig(profiler="torch", torch_profiler_dir=request["traces"], torch_profiler_with_stack=False)
    return {"model": request["model"], "profiler_config": profiler, **_VLLM, **request["arguments"]}


def _run_vllm(request: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**_vllm_arguments(request))
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    llm.start_profile()
    llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    llm.stop_profile()
    print("GENERATED", flush=True)


def _serve_vllm(request: dict[str, Any]) -> None:
    import asyncio

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def main() -> None:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**_vllm_arguments(request)))
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        await llm.start_profile()
        async for _ in llm.generate({"prompt_token_ids": PROMPT}, sampling, "1"):
            pass
        await llm.stop_profile()
        print("GENERATED", flush=True)
        llm.shutdown()

    asyncio.run(main())


def _run_sglang(request: dict[str, Any]) -> None:
    import sglang

    engine = sglang.Engine(model_path=request["model"], **_SGLANG, **request["arguments"])
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    engine.generate(input_ids=[PROMPT], sampling_params=sampling)
    engine.start_profile(output_dir=request["traces"], activities=["CPU", "GPU"], with_stack=False)
    engine.generate(input_ids=[PROMPT], sampling_params=sampling)
    engine.stop_profile()
    print("GENERATED", flush=True)
    engine.shutdown()


def main() -> None:
    """Write the models, run all engines at once, trim what they wrote."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--vllm")
    parser.add_argument("--sglang")
    parser.add_argument("--run")
    options = parser.parse_args()
    if options.run:
        _run(json.loads(options.run))
        return
    paths = {name: path for name in MODELS if (path := getattr(options, name)) is not None}
    whole = options.out.with_name(options.out.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    for name in paths:
        MODELS[name].write(whole / name)
    names = [name for name, (engine, _, _) in RECORDINGS.items() if engine in paths]
    with ThreadPoolExecutor(len(names)) as pool:
        for name, status, seconds in pool.map(lambda name: record(name, whole, paths), names):
            print(f"{name}: exit status {status} after {seconds:.0f} s", flush=True)
    trim.trim(whole, options.out)


if __name__ == "__main__":
    main()
