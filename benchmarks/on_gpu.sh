#!/usr/bin/env bash
# Measures everything on one GPU in at most nine minutes, most important first:
#
#     benchmarks/on_gpu.sh OUT [--tiny] [--seconds S] [BENCHMARK ...]
#
# OUT gets a JSON record per benchmark, summary.md, log.txt and the profiles. Each record is written
# again after every measurement, so that a run that is cut off still counts. The exit status is 1 if
# JAX finds no GPU or a check of parity fails. docs/benchmarks.md describes the parts. Needs no
# network. Environment variables:
#
# PYTHON: the Python to use (default: python3). It must have JAX for CUDA and what setup.cfg
#     requires; the comparisons also need torch and transformers. A part whose packages are missing
#     is recorded as not measured.
# WHEELS: a folder with wheels to install for this run only, such as missing ones. Installing them
#     takes a few seconds in addition to the nine minutes.
set -euo pipefail
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    echo "usage: benchmarks/on_gpu.sh OUT [--tiny] [--seconds S] [BENCHMARK ...]" >&2
    exit 2
fi
mkdir -p "$1"
set -- "$(cd "$1" && pwd)" "${@:2}"
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
if [ -n "${WHEELS:-}" ]; then
    WHEELS=$(cd "$WHEELS" && pwd)
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
cd "$(dirname "$0")/.."
"$python" -m benchmarks.on_gpu "$@" &
trap 'kill -TERM $!' TERM INT  # it ends what it started and writes the summary
wait $! || status=$?
wait $! || status=$?  # the first wait ends at a signal
exit "${status:-0}"
