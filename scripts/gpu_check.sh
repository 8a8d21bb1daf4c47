#!/usr/bin/env bash
# What this project does on one Hopper or Blackwell GPU, within 9 minutes and without a network:
#
#     bash scripts/gpu_check.sh [--dry] [OUT [OPTION OF kernels/benchmarks/run.py ...]]
#
# Needs a Python with torch, Triton, pydantic and pytest ($PYTHON, else .venv, else python3); nothing
# is installed. Whatever needs more (DeepSpeed, transformers, hypothesis) is skipped where that is
# missing. One part that fails does not keep the next from running. --dry: all of it but the tests
# on tiny inputs on the CPU, to try this script.
#
# OUT (else $OUT, else gpu_results) gets summary.txt, log.txt with what every part printed, and the
# figures: first_contact.json, train_step.json, moe.json, moe.md, nvfp4.json, nvfp4.md.
#
# Exit status: 0, all passed; 1, the summary says what failed or was not run; 2, no such GPU or
# Python, nothing was run.
set -euo pipefail

LIMIT_S=540
KILL_S=10

dry=""
if [[ "${1:-}" == --dry ]]; then
    dry=yes
    shift
fi
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUT="$(realpath -m "${1:-${OUT:-gpu_results}}")"
shift || true
cd "$ROOT"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ ! -x .venv/bin/python ]] || PYTHON="$ROOT/.venv/bin/python"
fi
export PYTHONPATH="$ROOT:$ROOT/kernels:$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

imports() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }

on=()
capability=9.0
if [[ -n "$dry" ]]; then
    imports torch || { echo "error: $PYTHON cannot import torch: set PYTHON" >&2; exit 2; }
    on=(--device cpu --tiny)
else
    found="$("$PYTHON" - <<'EOP'
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"error: {sys.executable} cannot import torch and triton: {error}")
if not torch.cuda.is_available():
    sys.exit("error: there is no CUDA device; nothing was run")
name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
if capability < (9, 0):
    sys.exit(f"error: {name} has compute capability {capability}, 9.0 is needed; nothing was run")
print("{}.{} {}, torch {}, Triton {}".format(*capability, name, torch.__version__, triton.__version__))
EOP
    )" || exit 2
    capability="${found%% *}"
    echo "${found#* }"
fi

mkdir -p "$OUT"
: >"$OUT/summary.txt"
: >"$OUT/log.txt"
status=0

note() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$OUT/summary.txt"; }

left() { echo "$((LIMIT_S - SECONDS - KILL_S))"; }

# step NAME SECONDS COMMAND ...: at the limit it is interrupted, so that it still reports what it
# has; KILL_S later it is killed.
step() {
    local name="$1" limit="$2" code=0
    shift 2
    [[ "$limit" -lt "$(left)" ]] || limit="$(left)"
    if [[ "$limit" -lt 5 ]]; then
        note "$name: NOT RUN, no time was left"
        status=1
        return
    fi
    printf '\n==== %s ====\n' "$name" | tee -a "$OUT/log.txt"
    timeout -s INT -k "$KILL_S" "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt" || code=$?
    case "$code" in
        0) note "$name: passed" ;;
        124 | 137) note "$name: FAILED, took more than $limit s" ;;
        *) note "$name: FAILED, status $code" ;;
    esac
    [[ "$code" == 0 ]] || status=1
}

# contact STEP SECONDS: a step of first_contact.py, in a process of its own: an illegal access would
# leave no GPU to the next.
contact() {
    step "$1" "$2" "$PYTHON" kernels/benchmarks/first_contact.py "$1" --out "$OUT" "${on[@]}"
}

contact compiler 40
# By all cores at once, for what follows.
[[ -n "$dry" ]] || step code 60 "$PYTHON" scripts/compile_kernels.py --arch "$([[ "$capability" == 9.* ]] && echo 90 || echo 100)"
contact ops 120
contact training 120
contact packed 60
contact deterministic 40
contact profile 90
step train_step 130 "$PYTHON" kernels/benchmarks/train_step.py --budget 120 --out "$OUT" "${on[@]}"

# The files that run something on the GPU, this project's kernels first; then their specification.
files=(
    tests/kernels/test_moe_*.py
    tests/kernels/test_conv1d_kernel.py
    tests/kernels/test_loss_kernel.py
    tests/kernels/test_norm_kernel.py
    tests/kernels/test_ssd_kernel.py
    tests/model/test_moe_paths.py
    tests/kernels/test_triton_env.py
    tests/kernels/test_benchmark_run.py
    tests/kernels/test_nvfp4_kernel.py
    tests/kernels/test_nvfp4_grouped.py
    tests/kernels/test_nvfp4_gemm.py
    tests/kernels/test_moe.py
    tests/kernels/test_wide.py
)
if [[ -n "$dry" ]]; then
    :
elif imports pytest; then
    imports hypothesis || note 'tests: those that draw their inputs are skipped, hypothesis is missing'
    step tests "$(($(left) - 70))" "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider "${files[@]}"
else
    note 'tests: NOT RUN, pytest is missing'
    status=1
fi

budget() { echo "$(($(left) - ${1:-0} - 5))"; }
step benchmark "$(left)" \
    "$PYTHON" kernels/benchmarks/run.py --budget "$(budget 25)" --out "$OUT" "${on[@]}" "$@"
step nvfp4 "$(left)" \
    "$PYTHON" kernels/benchmarks/nvfp4.py --budget "$(budget)" --out "$OUT" "${on[@]}"

echo
cat "$OUT/summary.txt"
grep -E '^(FAILED|skipped) ' "$OUT/log.txt" | tee -a "$OUT/summary.txt" || true
note "results are in $OUT"
exit "$status"
