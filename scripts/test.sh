#!/usr/bin/env bash
# Make the environment with the development tools, check the style, the types and the kernels' code
# for GPUs, run the tests: without an option all but long sweeps, with --fast the quick ones and the
# code for one architecture, with --all every one. Further arguments go to pytest:
# bash scripts/test.sh tests/cli -k help
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/environment.sh
source "$ROOT/scripts/environment.sh"
cd "$ROOT"

lane=()
archs=()
case "${1:-}" in
    --fast) lane=(-m 'not slow and not sweep') archs=(--arch 100) && shift ;;
    --all) lane=(-m '') && shift ;;
esac

make_environment dev
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# Hundreds of processes import the same libraries: compiled once, they do it in a third of the time.
# Images often forbid to write what was compiled.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX="$VENV/pycache"
bin="$VENV/bin"

# All checks run, so that one call shows everything; the last lines are pytest's summary.
status=0
"$bin/ruff" check . || status=1
"$bin/ruff" format --check . || status=1
types="$(mktemp)"
"$bin/mypy" >"$types" 2>&1 & # on one core of its own
"$bin/python" scripts/compile_kernels.py "${archs[@]}" || status=1
wait $! || status=1
cat "$types" && rm "$types"
# Three at once: on two cores, as one of them often waits for processes of its own.
"$bin/python" -m pytest -n 3 --dist worksteal "${lane[@]}" "$@" || status=$?
exit "$status"
