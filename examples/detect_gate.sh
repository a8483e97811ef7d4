#!/usr/bin/env bash
# A gate for CI or a rollout: passes only if a launch really runs tensor parallel.
#
#     examples/detect_gate.sh boot.log            or a server's URL, a process id, a profiler trace
#
# Exit status: 0 it does, 1 it does not, or nothing in the source tells.
set -euo pipefail

source=${1:?name a log, a server, a process id or a trace}

if ep2tp detect --expect tp "$source"; then
    echo "gate: passed"
else
    echo "gate: $source is not shown to run tensor parallel; the lines above say what was seen" >&2
    exit 1
fi
