#!/bin/bash
# Runs tests/gpu/test_sglang*.py on a GPU machine without internet: unpacks an SGLang that was brought along, starts pytest.
#
#   KIT=DIR OUT=DIR tests/gpu/run_sglang.sh [PYTEST ARGUMENTS]
#
# KIT/*/*.whl                          SGLang 0.5.17 and what it needs beyond torch 2.11, wheels in any subfolders
# KIT/missing/*.whl                    wheels to install only where the machine's Python lacks them (wrapt, pytest, ...)
# KIT/*/sglang_kernel_sm90.tar.xz      sglang-kernel without what Hopper does not need
# OUT                                  gets summary.json, pytest.log, figures.jsonl, machine.txt and logs.tar.gz
# SECONDS_FOR_TESTS                    stops pytest (default 420)
set -uo pipefail
repo=$(cd "$(dirname "$0")/../.." && pwd)
KIT=$(realpath "$KIT") OUT=$(realpath -m "$OUT") site=/opt/sgl meta=/tmp/ep2tp_meta
export GPU_TEST_LOGS=/tmp/sglang_gpu_logs PYTHONPATH=$repo:$site:$meta
rm -rf "$GPU_TEST_LOGS"
mkdir -p "$site" "$OUT" "$GPU_TEST_LOGS" "$meta/ep2tp-0.1.0.dist-info"

# ep2tp's own entry points, without building a wheel here.
printf 'Metadata-Version: 2.1\nName: ep2tp\nVersion: 0.1.0\n' >"$meta/ep2tp-0.1.0.dist-info/METADATA"
printf '[sglang.srt.plugins]\nep2tp = ep2tp.engines.sglang.plugin:register\n' >"$meta/ep2tp-0.1.0.dist-info/entry_points.txt"

missing_wheels() {
  python3 - "$KIT"/missing/*.whl <<'PY'
import importlib.metadata, pathlib, sys
for wheel in sys.argv[1:]:
    try:
        importlib.metadata.version(pathlib.Path(wheel).name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        if pathlib.Path(wheel).exists():
            print(wheel)
PY
}

start=$SECONDS
find "$KIT" -name '*.whl' -not -path '*/missing/*' >/tmp/wheels
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
  $(cat /tmp/wheels) $(missing_wheels) 2>&1 | tail -n 3
find "$KIT" -name 'sglang_kernel_sm90.tar.xz' -exec tar xJf {} -C "$site" \;
echo "kit installed after $((SECONDS - start)) s"

export HF_HUB_OFFLINE=1 SGLANG_ENABLE_JIT_DEEPGEMM=0 FLASHINFER_CUDA_ARCH_LIST=9.0a PYTHONUNBUFFERED=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2=0
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}
{ nvidia-smi; nvidia-smi topo -m; free -g; nproc; df -h /dev/shm /tmp; python3 -m pip list; } >"$OUT/machine.txt" 2>&1
python3 -c 'import importlib.metadata as m, ep2tp
print("sglang", m.version("sglang"), "ep2tp", ep2tp.__file__, [e.value for e in m.entry_points(group="sglang.srt.plugins")])'

timeout -k 10 "${SECONDS_FOR_TESTS:-420}" python3 -m pytest "$repo"/tests/gpu/test_sglang*.py -m gpu -s -rA --tb=short \
  -p no:cacheprovider --junitxml="$OUT/junit.xml" "$@" 2>&1 | tee "$OUT/pytest.log"
status=$?
cp "$GPU_TEST_LOGS"/figures.jsonl "$OUT" 2>/dev/null
tar cz -C "$GPU_TEST_LOGS" . >"$OUT/logs.tar.gz"
for log in "$GPU_TEST_LOGS"/*.log; do
  echo "== $log"; grep -hE 'Error: |GENERATED|rewrote this launch' "$log" | tail -n 4 | cut -c1-300
done
python3 - "$OUT" "$status" <<'PY'
import json, pathlib, sys
from xml.etree import ElementTree
out, status = pathlib.Path(sys.argv[1]), int(sys.argv[2])
suite = ElementTree.parse(out / "junit.xml").getroot()[0] if (out / "junit.xml").exists() else None
counts = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")} if suite is not None else {}
failed = [case.get("name") for case in suite or () if case.find("failure") is not None or case.find("error") is not None]
figures = out / "figures.jsonl"
summary = {"status": status, **counts, "failed": failed}
summary["figures"] = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
(out / "summary.json").write_text(json.dumps(summary, indent=1))
print("SUMMARY", json.dumps(summary))
PY
exit $status
