"""The detector on boot logs: those that engines wrote, and lines that were bent to mislead it."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ep2tp.observe.boot_log import read_log
from ep2tp.observe.evidence import Plan
from ep2tp.observe.source import read_source
from ep2tp.observe.verdict import Verdict, judge
from tests.observe.recordings import LOGS, RECORDINGS, recorded


def of_text(text: str) -> Verdict:
    return judge(read_log(io.StringIO(text)))


def log(name: str) -> str:
    return (LOGS / f"{name}.log").read_text()


@pytest.mark.parametrize("name", recorded())
def test_a_real_engines_output(name: str) -> None:
    verdict = judge(read_source(str(LOGS / name)))
    assert (verdict.plan.value, verdict.engine, verdict.confidence) == RECORDINGS[name]


def test_the_recordings_on_this_cpu_ship() -> None:
    assert len([name for name in recorded() if name.startswith("vllm-0.32.0")]) == 8


@pytest.mark.parametrize("name", [name for name in recorded() if name.endswith(".log")])
def test_evidence_names_the_lines_it_stands_on(name: str) -> None:
    lines = (LOGS / name).read_text().splitlines()
    numbered = [piece for piece in judge(read_source(str(LOGS / name))).evidence if piece.line is not None]
    assert numbered
    for piece in numbered:
        assert piece.text.strip(".")[:60] in lines[piece.line - 1]


def test_without_its_decisive_lines_a_log_decides_less() -> None:
    text = log("vllm-0.32.0-tep2-crashes")
    without_names = re.sub(r"\(Worker_TP(\d)_EP\d", r"(Worker", text)
    assert of_text(without_names).plan is Plan.TEP  # "[EP Rank" is left
    neither = "\n".join(line for line in without_names.splitlines() if "[EP Rank" not in line)
    assert of_text(neither).confidence != "high"


def test_a_rule_of_dashes_is_no_change_of_a_setting() -> None:
    """torch's profiler prints tables into the log."""
    assert not [
        piece
        for piece in judge(read_log(io.StringIO(log("vllm-0.32.0-tep2-rewritten")))).evidence
        if "---" in piece.text
    ]
    assert "ep2tp changed --enable-expert-parallel" in str(of_text(log("vllm-0.32.0-tep2-rewritten")))


def test_the_launch_arguments_alone_are_a_hint() -> None:
    [line] = [line for line in log("vllm-0.32.0-tep2-crashes").splitlines() if "non-default args" in line]
    verdict = of_text(line)
    assert verdict.plan is Plan.UNKNOWN
    assert verdict.fits == {Plan.TEP, Plan.DEP}


def test_the_launch_arguments_do_not_overrule_the_rewrite() -> None:
    verdict = of_text(log("vllm-0.32.0-tep2-rewritten"))
    [asked] = [i for i, piece in enumerate(verdict.evidence) if "asked for expert parallelism" in piece.reading.says]
    assert verdict.contradictions == {asked: verdict.contradictions[asked]}
    assert "rewrote" in verdict.evidence[verdict.contradictions[asked]].reading.says


def test_the_last_launch_counts() -> None:
    first, second = log("vllm-0.32.0-tep2-crashes"), log("vllm-0.32.0-tp2")
    verdict = of_text(first + second)
    assert verdict.plan is Plan.TP
    begin = next(i for i, line in enumerate(second.splitlines(), 1) if "non-default args" in line)
    assert verdict.evidence[0].line == len(first.splitlines()) + begin
    assert "the last of 2 launches" in verdict.evidence[0].reading.says
    assert of_text(second + first).plan is Plan.TEP


def test_ep2tp_and_workers_that_disagree_are_a_contradiction() -> None:
    broken = log("vllm-0.32.0-tep2-rewritten").replace("(Worker_TP1 ", "(Worker_TP1_EP1 ")
    verdict = of_text(broken)
    assert verdict.plan is Plan.MIXED
    assert verdict.confidence == "low"
    assert verdict.contradictions


def test_colours_and_time_stamps_before_the_prefix() -> None:
    text = log("vllm-0.32.0-tep2-crashes")
    coloured = re.sub(r"^(\([^)]*\))", "\x1b[0;36m\\1\x1b[0;0m", text, flags=re.MULTILINE)
    for prefix in ("2026-11-24T20:22:36.123456789Z stdout F ", "Nov 24 20:22:36 node1 vllm[4711]: ", "vllm-1  | "):
        stamped = re.sub(r"^", prefix, coloured, flags=re.MULTILINE)
        assert len(of_text(stamped).evidence) == len(of_text(text).evidence)
        assert (of_text(stamped).plan, of_text(stamped).confidence) == (Plan.TEP, "high")
    assert "\x1b" not in "".join(piece.text for piece in of_text(stamped).evidence)


def docker(text: str) -> str:
    """docker's json-file driver: an entry a line; a line of more than 16 KiB in pieces, with stdout's in between."""
    request = json.dumps({"log": "GET /health\n", "stream": "stdout", "time": "2026-11-24T20:22:36.1Z"}) + "\n"
    entries = []
    for line in text.splitlines(keepends=True):
        pieces = [line[i : i + 16_384] for i in range(0, len(line), 16_384)]
        entries += [json.dumps({"log": piece, "stream": "stderr", "time": "t"}) + "\n" for piece in pieces]
    return request.join(entries)


def journald(text: str) -> str:
    """``journalctl -o json``, of a service that writes in colours: journald lists the bytes of such a message."""
    coloured = re.sub(r"^(\([^)]*\))", "\x1b[0;36m\\1\x1b[0;0m", text, flags=re.MULTILINE)
    messages = [list(line.encode()) if "\x1b" in line else line for line in coloured.splitlines()]
    return "".join(json.dumps({"_PID": "7", "MESSAGE": message, "PRIORITY": "6"}) + "\n" for message in messages)


def json_logger(text: str) -> str:
    return "".join(json.dumps({"level": "INFO", "message": line}) + "\n" for line in text.splitlines())


@pytest.mark.parametrize("wrap", [docker, journald, json_logger])
@pytest.mark.parametrize("name", [name for name in recorded() if name.endswith(".log")])
def test_lines_in_json_objects_say_what_they_say_bare(name: str, wrap: Callable[[str], str]) -> None:
    text = (LOGS / name).read_text()
    wrapped, bare = of_text(wrap(text)), of_text(text)
    assert (wrapped.plan.value, wrapped.engine, wrapped.confidence) == RECORDINGS[name]
    assert [piece.reading for piece in wrapped.evidence] == [piece.reading for piece in bare.evidence]


def test_the_line_numbers_are_the_files() -> None:
    text = log("vllm-0.32.0-tep2-crashes")
    assert [p.line for p in of_text(json_logger(text)).evidence] == [p.line for p in of_text(text).evidence]


def test_arguments_in_two_pieces_are_read_as_one_line() -> None:
    arguments = {"model_path": "m" * 20_000, "tp_size": 8, "ep_size": 8}
    line = f"[2026-11-24 20:22:36] server_args={arguments!r}\n"
    verdict = of_text(json_logger("first") + docker(line))
    assert verdict.plan is Plan.TEP
    assert verdict.evidence[0].line == 2
    assert of_text(docker(line).splitlines()[0]).plan is Plan.UNKNOWN  # a log that ends there


@pytest.mark.parametrize(
    "line", ['{"log": 3}', '{"log": null, "message": []}', "{", '{"MESSAGE": [1, -1]}', "{}", "[" * 9999]
)
def test_json_without_a_message_is_a_line_like_any_other(line: str) -> None:
    assert of_text(f"{line}\n" + log("vllm-0.32.0-tp2")).plan is Plan.TP


@pytest.mark.parametrize("name", ["tep2-crashes", "tep2-rewritten", "dep2-crashes", "tp2"])
def test_ranks_that_write_in_any_order_and_into_one_anothers_lines(name: str) -> None:
    verdict = of_text(log(f"vllm-0.32.0-{name}"))
    lines = log(f"vllm-0.32.0-{name}").splitlines()
    first = next((i for i, line in enumerate(lines) if "non-default args" in line), 0) + 1
    for seed in range(20):
        workers = lines[first:]
        random.Random(seed).shuffle(workers)
        shuffled = of_text("\n".join(lines[:first] + workers))
        assert (shuffled.plan, shuffled.confidence) == (verdict.plan, verdict.confidence)
        joined = of_text("\n".join(lines[:first]) + "\n" + re.sub(r"\n(?=\(Worker_\w+1)", "", "\n".join(workers)))
        assert joined.plan is verdict.plan


def test_a_prompt_that_quotes_a_log_tells_nothing() -> None:
    quoted = "(APIServer pid=1) INFO 11-24 20:22:36 [logger.py:40] Received request a: prompt: 'Why does vLLM print "
    prompts = "".join(
        f"{quoted}{words}?', params: SamplingParams(n=1)\n"
        for words in (
            "(Worker_TP0_EP0 pid=1) INFO",
            "[EP Rank 0/2] Expert parallelism is enabled. Local/global number of experts: 4/8",
            "Using DeepEPLLAll2AllManager all2all manager.",
            "non-default args: {'enable_expert_parallel': True}",
            "server_args={'tp_size': 2, 'ep_size': 2}",
        )
    )
    assert of_text(log("vllm-0.32.0-tp2") + prompts) == of_text(log("vllm-0.32.0-tp2"))
    quoted = (
        "[2026-11-24 20:22:36] Receive: obj=GenerateReqInput(text='[log] Using DeepEPLLPrepareAndFinalize', rid=1)\n"
    )
    assert of_text(log("sglang-0.5.23-tp2") + quoted) == of_text(log("sglang-0.5.23-tp2"))


@pytest.mark.parametrize(
    ("line", "plans"),
    [
        ("[cuda_communicator.py:280] Using AgRsAll2AllManager all2all manager.", {"DEP", "mixed"}),
        ("[fp8.py:1] Using DeepEPLLPrepareAndFinalize", {"DEP"}),
        ("[fp8.py:1] Using MoEPrepareAndFinalizeNoDPEPMonolithic", {"TP", "TEP"}),
        ("[fp8.py:1] Using PassThroughPrepareAndFinalize", {"DEP"}),
        ("[a.py:1] Detected DP deployment with no --enable-expert-parallel. Falling back to", {"mixed"}),
        ("[default_loader.py:482] EP weight filter: ep_size=4, ep_rank=0, loading 2/8 experts", {"TEP", "DEP"}),
        # vLLM 0.25.1 and 0.28.0, and since 0.32.0; it decides nothing.
        ("[p.py:1] rank 1 in world size 2 is assigned as DP rank 0, PP rank 0, PCP rank 0, TP rank 1, EP rank 1, "
         "EPLB rank N/A", {"TP", "TEP", "DEP", "mixed"}),
        ("[p.py:1] rank 1 in world size 2 is assigned as DP rank 0, PP rank 0, PCP rank 0, TP rank 1, ETP rank 0, "
         "EP rank 1, EPLB rank N/A", {"TP", "TEP", "DEP", "mixed"}),
        ("[p.py:1] rank 0 in world size 1 is assigned as DP rank 0, PP rank 0, PCP rank 0, TP rank 0, EP rank 0, "
         "EPLB rank N/A", {"TP"}),
    ],
)  # fmt: skip
def test_lines_of_vllm(line: str, plans: set[str]) -> None:
    [first, *_] = read_log(io.StringIO(f"(Worker pid=7) INFO 11-24 20:22:36 {line}\n"))
    assert {plan.value for plan in first.reading.plans} == plans
    assert first.engine == "vllm"


_ARGUMENTS = {"model_path": "m", "tp_size": 8, "ep_size": 1, "moe_a2a_backend": "none", "attn_dp_size": 1}


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, "TP"),
        ({"ep_size": 8}, "TEP"),
        ({"ep_size": 4}, "mixed"),  # four groups of experts, each sliced over two ranks
        ({"ep_size": 8, "moe_a2a_backend": "deepep"}, "DEP"),
        ({"attn_dp_size": 8}, "mixed"),
        ({"attn_dp_size": 8, "ep_size": 8}, "DEP"),
        ({"dp_size": 8, "enable_dp_attention": True, "ep_size": 8}, "DEP"),
        ({"dp_size": 2, "enable_dp_attention": False}, "TP"),  # replicas
        ({"tp_size": 1}, "TP"),
        ({"attn_dp_size": None, "dwdp_size": None}, "TP"),
    ],
)
def test_server_args_of_sglang(changes: dict[str, object], plan: str) -> None:
    arguments = _ARGUMENTS | changes
    as_dict = f"[2026-11-24 20:22:36] server_args={arguments!r}\n"
    as_dataclass = f"server_args=ServerArgs({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    for text in (as_dict, f"[2026-11-24 20:22:36] {as_dataclass}\n"):
        verdict = of_text(text)
        assert verdict.plan.value == plan
        assert verdict.engine == "sglang"


def test_sglang_says_its_arguments_twice_and_they_are_one_launch() -> None:
    line = f"[2026-11-24 20:22:36] server_args={_ARGUMENTS!r}\n"
    again = f"[2026-11-24 20:22:37] server_args={_ARGUMENTS | {'ep_size': 8}!r}\n"
    verdict = of_text(line + again)
    assert verdict.plan is Plan.TEP  # what was resolved last
    assert not any("launches" in piece.reading.says for piece in verdict.evidence)
    worker = "[2026-11-24 20:22:38 TP0 EP0] Load weight begin.\n"
    assert "the last of 2 launches" in of_text(line + worker + again).evidence[0].reading.says


def test_how_sglang_resolved_its_arguments_belongs_to_their_launch() -> None:
    adjusted = (
        "[2026-11-24 20:22:35] deepep MoE is enabled. The expert parallel size is adjusted from 1 to the tensor\n"
    )
    arguments = f"[2026-11-24 20:22:36] server_args={_ARGUMENTS | {'ep_size': 8, 'moe_a2a_backend': 'deepep'}!r}\n"
    worker = "[2026-11-24 20:22:38 TP0 EP0] Load weight begin.\n"
    verdict = of_text((adjusted + arguments + worker) * 3)
    assert (verdict.plan, verdict.confidence) == (Plan.DEP, "high")
    assert "the last of 3 launches" in verdict.evidence[0].reading.says
    assert [piece.line for piece in verdict.evidence] == [7, 7, 8, 9]


@pytest.mark.parametrize(
    "line",
    [
        "deepep MoE is enabled. The expert parallel size is adjusted from 1 to the tensor parallel size [2].",
        "DeepEP v2 MoE is enabled. The expert parallel size is adjusted to be the same as the tensor parallel size[2].",
        "FlashInfer MegaMOE is enabled. The expert parallel size is adjusted",
        "DWDP enabled: dwdp_size=4, ",
    ],
)
def test_sglang_turns_expert_parallelism_on_by_itself(line: str) -> None:
    assert of_text(f"[2026-11-24 20:22:36] {line}\n").plan is Plan.DEP


def test_standard_input_and_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(log("vllm-0.32.0-dep2-crashes").encode())
    command = [sys.executable, "-m", "ep2tp", "detect", "-", "--json"]
    found = json.loads(subprocess.run(command, input=packed, capture_output=True, check=True).stdout)
    assert found["plan"] == "DEP"


def test_an_empty_log_and_bytes_that_are_no_text() -> None:
    assert of_text("").plan is Plan.UNKNOWN
    assert of_text("\x00\ufffd(Worker_\n" * 10).plan is Plan.UNKNOWN


_MEASURE = """
from ep2tp.observe.source import read_source
from ep2tp.observe.verdict import judge
found = judge(read_source("-")).plan
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(found, peak)
"""


def test_memory_does_not_grow_with_the_log() -> None:
    """200 MB of a busy server's log, one line of 20 MB without an end, and 300 000 different collectives."""
    boot = log("vllm-0.32.0-tp2").encode()
    request = b'(APIServer pid=1) INFO:     127.0.0.1:40312 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'
    nccl = b"h:1:2 [0] NCCL INFO AllReduce: opCount %x sendbuff 0x7 recvbuff 0x7 count %d datatype 9 op 0 root 0 comm 0xa [nranks=2] stream 0x1\n"  # noqa: E501

    def peak(blocks: int, calls: int) -> int:
        with subprocess.Popen(
            [sys.executable, "-c", _MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(boot + b"x" * (blocks * 100_000) + b"\n")
            for _ in range(blocks):
                process.stdin.write(request * 11_000)
            for i in range(0, calls, 1000):
                process.stdin.write(b"".join(nccl % (n, n) for n in range(i, i + 1000)))
            process.stdin.close()
            plan, kilobytes = process.stdout.read().split()
        assert plan == b"TP"
        return int(kilobytes)

    assert peak(200, 300_000) < peak(2, 3_000) + 24_000
