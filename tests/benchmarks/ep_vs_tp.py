"""TP, TEP and DEP on real GPUs under each kind of link, beside what ``ep2tp plan`` computes for them.

    ep_vs_tp.py --out results.jsonl                         two GPUs, within --budget seconds
    ep_vs_tp.py --out results.jsonl --links host --launches TEP-rewritten,DEP-rewritten
    ep_vs_tp.py --out results.jsonl --dry-run               a tiny model on this CPU: does the harness itself work?

Launches: TP, TEP, DEP as stock vLLM runs them (EP2TP=off), and the TEP and DEP command lines rewritten by ep2tp
(EP2TP=on). Links: nvlink (NCCL as it comes), host (NCCL_P2P_DISABLE=1), socket (NCCL_SHM_DISABLE=1 too); the last two
without vLLM's custom all-reduce. Models (ep_vs_tp_models.py) have published shapes with fewer layers and random
weights; routing is uniform (VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random), as the planner assumes, and drawn by
each data-parallel rank for itself.

One JSON line for the machine, one for each link's calibration, one for each launch and link. A launch that fails or
hangs is a line with its error, and the rest goes on. Launches that --budget leaves no time for are lines, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_vs_tp_models import MODELS, model_config
from ep_vs_tp_planner import figures

from ep2tp.demo.engines import CPU_ENVIRONMENT, VLLM
from ep2tp.demo.launch import EngineRun
from ep2tp.errors import Ep2tpError
from ep2tp.planner.calibrate import calibrate
from ep2tp.planner.memory import GB
from ep2tp.planner.profile import Profile

HERE = Path(__file__).parent
LINKS: dict[str, dict[str, str]] = {
    "nvlink": {},
    "host": {"NCCL_P2P_DISABLE": "1"},
    "socket": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
LAUNCHES = ("TP", "TEP", "DEP", "TEP-rewritten", "DEP-rewritten")


@dataclass(frozen=True)
class Case:
    """One engine to time."""

    launch: str
    link: str
    ranks: int

    @property
    def engine(self) -> dict[str, Any]:
        """The parallel arguments of the launch."""
        sizes: dict[str, Any] = {"tensor_parallel_size": self.ranks}
        if self.launch.startswith("DEP"):
            sizes = {"tensor_parallel_size": 1, "data_parallel_size": self.ranks}
        if self.launch != "TP":
            sizes["enable_expert_parallel"] = True
        if self.link != "nvlink":
            sizes["disable_custom_all_reduce"] = True
        return sizes

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the engine's process."""
        return {
            **LINKS.get(self.link, {}),
            "EP2TP": "on" if self.launch.endswith("rewritten") else "off",
            "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random",
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # the same runner for every launch
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }


@dataclass
class Engine:
    """An engine in a process of its own: it starts, says so, waits for its turn, and is timed."""

    case: Case
    process: subprocess.Popen[bytes]
    logs: Path
    is_eager: bool
    started: float

    @classmethod
    def start(
        cls, case: Case, logs: Path, request: dict[str, Any], environment: dict[str, str], is_eager: bool
    ) -> Engine:
        """Start it; its files are in ``logs``, named after the case."""
        stem = logs / f"{case.launch}-{case.link}"
        for kind in ("ready", "go", "result.json"):
            Path(f"{stem}.{kind}").unlink(missing_ok=True)
        Path(f"{stem}.request.json").write_text(json.dumps(request), encoding="utf-8")
        with Path(f"{stem}.log").open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "ep_vs_tp_engine.py"), str(stem)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return cls(case, process, logs, is_eager, time.monotonic())

    def path(self, kind: str) -> Path:
        """One of its files."""
        return self.logs / f"{self.case.launch}-{self.case.link}.{kind}"

    @property
    def is_ready(self) -> bool:
        """Whether it waits for its turn, or has ended."""
        return self.path("ready").is_file() or self.process.poll() is not None

    def time_it(self, until: float) -> int:
        """Give it its turn; returns when it is timed, has failed, or takes too long (-SIGALRM)."""
        self.path("go").touch()
        while not self.path("result.json").is_file():  # an engine that hangs while it ends has answered all the same
            if self.process.poll() is not None:
                return self.process.returncode
            if time.monotonic() > until:
                return -signal.SIGALRM
            time.sleep(0.2)
        return 0


def main() -> None:
    """Run the selection."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ep-vs-tp-") as folder, options.out.open("a", encoding="utf-8") as out:
        Harness(options, Path(folder), out).run()


class Harness:
    """Runs the cases one after the other, and writes a line for each."""

    def __init__(self, options: argparse.Namespace, folder: Path, out: Any) -> None:
        self.options, self.folder, self.out = options, folder, out
        self.deadline = time.monotonic() + options.budget
        self.logs = options.logs or folder
        self.logs.mkdir(parents=True, exist_ok=True)
        self.model = self._write_model()
        self.config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))

    def run(self) -> None:
        """All of it."""
        self.machine = {"model": self.options.model, "config": self.config, "prompt": self.options.prompt}
        self.machine |= {"steps": self.options.steps, "prefill": self.options.prefill}
        self._line(kind="machine", command=sys.argv, **self.machine, **_machine())
        profiles = {link: self._calibrate(link) for link in self.options.links}
        order = [c for c in LAUNCHES if c in self.options.launches and not c.endswith("rewritten")]
        cases = [Case(launch, link, self.options.ranks) for link in self.options.links for launch in order]
        late = [c for c in LAUNCHES if c in self.options.launches and c.endswith("rewritten")]
        links = sorted(self.options.links, key=lambda link: link != "host")  # where it matters first
        cases += [Case(launch, link, self.options.ranks) for link in links for launch in late]
        for first in range(0, len(cases), self.options.together):
            self._run_cases(cases[first : first + self.options.together], profiles, self.options.eager)

    def _write_model(self) -> Path:
        folder = self.folder / "model"
        folder.mkdir()
        if self.options.dry_run:
            from ep2tp.demo.tiny import TinyModel

            return TinyModel(heads=8).write(folder)
        (folder / "config.json").write_text(json.dumps(model_config(self.options.model, self.options.layers)))
        return folder

    def _calibrate(self, link: str) -> Profile | None:
        if not self.options.calibrate:
            return None
        before = dict(os.environ)
        os.environ.update(LINKS.get(link, {}))
        path = self.logs / f"profile-{link}.json"
        try:
            profile = calibrate(self.options.ranks, path, 90)
        except Ep2tpError as error:
            self._line(kind="calibration", link=link, error=str(error))
            return None
        finally:
            os.environ.clear()
            os.environ.update(before)
        self._line(kind="calibration", link=link, profile=json.loads(path.read_text(encoding="utf-8")))
        return profile

    def _run_cases(self, cases: list[Case], profiles: dict[str, Profile | None], is_eager: bool) -> None:
        """Start several engines at once, time one after the other; what fails with CUDA graphs, once more without."""
        limit = min(self.options.limit, self.deadline - time.monotonic())
        if limit < self.options.least:
            for case in cases:
                self._line(kind="launch", **vars(case), error=f"not started: {limit:.0f} s of the budget were left")
            return
        is_eager = is_eager or self.options.dry_run
        engines = [self._start(case, is_eager) for case in cases]
        until = time.monotonic() + limit
        while not all(engine.is_ready for engine in engines) and time.monotonic() < until:
            time.sleep(0.2)
        errors = [self._finish(engine, profiles[engine.case.link], until) for engine in engines]
        failed = [e.case for e, error in zip(engines, errors, strict=True) if error and not _is_refusal(error)]
        for engine in engines:
            _end_group(engine.process)
        if failed and not is_eager and time.monotonic() < until:
            self._run_cases(failed, profiles, True)

    def _finish(self, engine: Engine, profile: Profile | None, until: float) -> str | None:
        """Let an engine be timed, and write its line; its error, if it failed."""
        status = engine.time_it(max(until, time.monotonic() + 30))
        log = engine.path("log").read_text(encoding="utf-8", errors="replace")
        shared = {"kind": "launch", **vars(engine.case), "cuda_graphs": not engine.is_eager}
        shared |= {"seconds": round(time.monotonic() - engine.started, 1), "engine": engine.case.engine}
        if not engine.path("result.json").is_file():
            error = _failure(status, log)
            self._line(**shared, error=error, log_tail=log[-1500:])
            return error
        result = json.loads(engine.path("result.json").read_text(encoding="utf-8"))
        found = re.search(r"Model loading took ([\d.]+) GiB", log)
        reported = round(float(found[1]) * 1024**3 / GB, 3) if found else None
        result["weights_gb"] = reported or round(max(result["parameter_bytes"]) / GB, 3)
        line = {**shared, **result}
        self._line(**line, planner=figures(self.machine, line, profile))
        return None

    def _engine(self, is_eager: bool) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "model": str(self.model),
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "enable_prefix_caching": False,
            "max_model_len": max(self.options.prefill + 64, self.options.prompt + self.options.steps),
            "max_num_seqs": max(self.options.batches),
            "max_num_batched_tokens": max(self.options.prefill + 64, 2048),
            "worker_extension_cls": "ep_vs_tp_engine.Worker",
        }
        if self.options.dry_run:
            return {**shared, "dtype": "bfloat16", "enforce_eager": True, "distributed_executor_backend": "mp"}
        batches = self.options.batches  # of all ranks, and of one where they are data parallel
        sizes = sorted({*batches, *(-(-batch // self.options.ranks) for batch in batches)})
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        memory = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}  # several engines share the GPUs
        gpu = {**memory, "moe_backend": "triton", "disable_log_stats": True}
        return {**shared, **gpu, **({"enforce_eager": True} if is_eager else {"compilation_config": graphs})}

    def _start(self, case: Case, is_eager: bool) -> Engine:
        request = {
            "engine": {**self._engine(is_eager), **case.engine},
            "batches": self.options.batches,
            "repeats": self.options.repeats,
            "prompt": self.options.prompt,
            "skipped": self.options.steps // 8,
            "steps": self.options.steps,
            "prefill": self.options.prefill,
            "vocabulary": self.config["vocab_size"],
        }
        environment = os.environ | case.environment
        if self.options.routing == "model":
            del environment["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"]
        if self.options.dry_run:
            environment |= CPU_ENVIRONMENT
        return Engine.start(case, self.logs, request, environment, is_eager)

    def _line(self, **values: Any) -> None:
        text = json.dumps(values)
        print(text if len(text) < 600 else text[:600] + " ...", flush=True)
        print(text, file=self.out, flush=True)


def _failure(status: int, log: str) -> str:
    """The reason of a failed engine in one line."""
    if status == -signal.SIGALRM:
        return "ended after its time limit"
    reason = EngineRun(max(status, 1), None, log, 0.0, VLLM).failure
    if "Worker failed" in reason and (bare := re.search(r"\b\w+Error$", log, re.MULTILINE)):
        reason = bare.group()  # an error without a message
    return reason[:500]


def _is_refusal(error: str) -> bool:
    """Whether an engine refused the sizes, with CUDA graphs or without."""
    return "divisible" in error or "group_size == 0" in error


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End workers that an engine leaves behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _machine() -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)

    return {
        "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "python": sys.version.split()[0],
        "gpus": output("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv"),
        "topology": output("nvidia-smi", "topo", "-m"),
        "processors": os.cpu_count(),
    }


def _names(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: use {', '.join(allowed)}")
        return found

    return parse


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--logs", type=Path, help="folder for engine logs (default: thrown away)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=sorted(MODELS), default="v3-fp8")
    parser.add_argument("--layers", type=int, help="layers of the model, the first one dense")
    parser.add_argument("--launches", type=_names(LAUNCHES), default=list(LAUNCHES))
    parser.add_argument("--links", type=_names((*LINKS, "gloo")), default=list(LINKS))
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--together", type=int, default=3, help="engines started at once; they are timed in turn")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a decoded request's prompt")
    parser.add_argument("--steps", type=int, default=512, help="tokens of a generation; the first eighth is not timed")
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--routing", choices=["uniform", "model"], default="uniform", help="model: the router's own")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--no-calibrate", dest="calibrate", action="store_false")
    parser.add_argument("--budget", type=float, default=420, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one launch")
    parser.add_argument("--least", type=float, default=40, help="seconds below which no launch is started")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    options = parser.parse_args()
    if options.dry_run:
        options.routing = "model"  # the simulator's int64 indices do not suit vLLM's CPU kernel
        options.links, options.batches, options.repeats = ["gloo"], [b for b in options.batches if b <= 4], 2
        options.steps, options.prefill, options.together = 16, 64, 1
    return options


if __name__ == "__main__":
    main()
