#!/bin/bash
# Runs tests/gpu on a GPU machine without internet: unpacks a vLLM that was brought along, then starts pytest.
#
#   KIT=DIR OUT=DIR tests/gpu/run_offline.sh [PYTEST ARGUMENTS]
#
# KIT/part.*        an xz archive of the unpacked vLLM wheel, split
# KIT/*.whl         wheels to install over what the machine's Python has
# KIT/missing/*.whl wheels to install only where the machine's Python lacks them; ep2tp's own gives its entry point
# OUT               gets pytest.log, figures.jsonl, machine.txt and logs.tar.gz
# SECONDS_FOR_TESTS stops pytest (default 430)
# RUN               a command to run in place of pytest, in the repository's root; OUT then gets run.log
#                   (RUN='python3 tests/benchmarks/ep_vs_tp.py --out $OUT/ep_vs_tp.jsonl --logs $OUT/ep_vs_tp')
set -uo pipefail
repo=$(cd "$(dirname "$0")/../.." && pwd)
KIT=$(realpath "$KIT") OUT=$(realpath "$OUT") site=/opt/site dep=/opt/dep
export GPU_TEST_LOGS=/tmp/gpu_test_logs

install_kit() {
  mkdir -p "$site" "$dep"
  if command -v xz >/dev/null; then unxz=(xz -dcT0); else unxz=(python3 -c 'import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer)'); fi
  cat "$KIT"/part.* | "${unxz[@]}" | tar x -C "$site" &
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$dep" "$KIT"/*.whl $(missing_wheels)
  wait
}

missing_wheels() {
  PYTHONPATH=$dep python3 - "$KIT"/missing/*.whl <<'PY'
import importlib.metadata, pathlib, sys
for wheel in sys.argv[1:]:
    try:
        importlib.metadata.version(pathlib.Path(wheel).name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PY
}

collect() {
  cp "$GPU_TEST_LOGS"/figures.jsonl "$OUT" 2>/dev/null
  tar cz -C "$GPU_TEST_LOGS" --exclude '*.npz' . >"$OUT/logs.tar.gz"
  for log in "$GPU_TEST_LOGS"/*.log; do
    echo "== $log"; grep -hE 'Error: |GENERATED|Using .* backend' "$log" | tail -n 4 | cut -c1-300
  done
}

start=$SECONDS
install_kit 2>&1 | tail -n 5
echo "kit installed after $((SECONDS - start)) s"
export PYTHONPATH=$repo:$site:$dep PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_USE_DEEP_GEMM=0 VLLM_USE_FLASHINFER_SAMPLER=0 # neither is in the kit
export GPU_TEST_JOBS=${GPU_TEST_JOBS:-5} GPU_TEST_SECONDS=${GPU_TEST_SECONDS:-390}
{ nvidia-smi; ip -br addr; free -g; nproc; df -h /dev/shm /tmp; gcc --version | head -n 1; python3 -m pip list; } \
  >"$OUT/machine.txt" 2>&1
python3 -c 'import importlib.metadata as m, vllm, ep2tp
print("vllm", vllm.__version__, "ep2tp", ep2tp.__version__, [e.value for e in m.entry_points(group="vllm.general_plugins")])'
if [ -n "${RUN:-}" ]; then
  export OUT
  cd "$repo" && timeout -k 10 "${SECONDS_FOR_TESTS:-430}" bash -c "$RUN" 2>&1 | tee "$OUT/run.log"
  exit "${PIPESTATUS[0]}"
fi
timeout -k 10 "${SECONDS_FOR_TESTS:-430}" python3 -m pytest "$repo/tests/gpu" -m gpu -s -rA --tb=short -p no:cacheprovider \
  "$@" 2>&1 | tee "$OUT/pytest.log"
status=$?
collect
exit $status
