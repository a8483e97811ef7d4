"""Ranks started by torchrun, each with an engine of its own: every one has to come to the same rewrite by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from ep2tp.demo.engines import CPU_ENVIRONMENT
from ep2tp.demo.launch import PROMPTS
from tests.engines.conftest import ODD, OneRank, tiny_model

pytestmark = pytest.mark.engine

SCRIPT = f"""
import os, sys
from vllm import LLM, SamplingParams

llm = LLM(
    model=sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, seed=0,
    tensor_parallel_size=2, enable_expert_parallel=True, distributed_executor_backend="external_launcher",
)
sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
output = llm.generate([{{"prompt_token_ids": {PROMPTS[0]}}}], sampling, use_tqdm=False)[0].outputs[0]
sys.stdout.write(f"\\nTOKENS {{os.environ['RANK']}} {{list(output.token_ids)}}\\n")
sys.stdout.flush()
"""


def test_each_rank_rewrites_alike(tiny_models: Path, one_rank: OneRank) -> None:
    model = tiny_model(tiny_models, ODD)
    script = tiny_models / "external.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run(
        [*launcher, str(script), str(model)],
        env=os.environ | CPU_ENVIRONMENT | {"EP2TP": "auto"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    tokens = dict(re.findall(r"TOKENS (\d) (\[.*?\])", run.stdout))
    expected = str(one_rank(ODD)[0])
    assert tokens == {"0": expected, "1": expected}
    assert (run.stdout + run.stderr).count("rewrote this launch to tensor parallelism") == 1
