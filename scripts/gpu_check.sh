#!/usr/bin/env bash
# Test and measure the kernels on one Hopper or Blackwell GPU, within 9 minutes, without a network:
#
#     bash scripts/gpu_check.sh [OUT [OPTION OF kernels/benchmarks/run.py ...]]
#
# Needs a Python with torch, Triton and pytest ($PYTHON, else .venv, else python3); nothing is
# installed. Without hypothesis, transformers or DeepSpeed the tests that need them are skipped. OUT
# (default gpu_results) gets summary.txt, code.txt, tests.txt, nvfp4.txt, benchmark.txt, and
# nvfp4.json, nvfp4.md, moe.json and moe.md after each row.
#
# Exit status: 0, all passed; 2, no such GPU or Python: nothing was run; else the sum of
# 4 (the generated code is not accepted), 8 (tests failed), 16 (the benchmark of MoE failed),
# 32 (the kernel tests were not run, pytest is missing), 64 (the benchmark of NVFP4 failed).
set -euo pipefail

LIMIT_S=540
CODE_S=90
TESTS_S=220
NVFP4_S=100
MARGIN_S=15
KILL_S=10

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUT="$(realpath -m "${1:-gpu_results}")"
shift || true
cd "$ROOT"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ ! -x .venv/bin/python ]] || PYTHON="$ROOT/.venv/bin/python"
fi
export PYTHONPATH="$ROOT:$ROOT/kernels:$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

imports() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }

"$PYTHON" - <<'EOP' || exit 2
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
print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}")
EOP

mkdir -p "$OUT"
: >"$OUT/summary.txt"
status=0

note() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$OUT/summary.txt"; }

# step NAME WEIGHT SECONDS COMMAND ...: output to OUT/NAME.txt; a failure adds WEIGHT to the status.
# At the limit it is interrupted, so that it still reports what it has; KILL_S later it is killed.
step() {
    local name="$1" weight="$2" limit="$3" code=0
    shift 3
    timeout -s INT -k "$KILL_S" "$limit" "$@" 2>&1 | tee "$OUT/$name.txt" || code=$?
    case "$code" in
        0) note "$name: passed" ;;
        124 | 137) note "$name: FAILED, took more than $limit s" ;;
        *) note "$name: FAILED, status $code" ;;
    esac
    [[ "$code" == 0 ]] || status=$((status + weight))
}

# Also fills Triton's cache on all cores.
step code 4 "$CODE_S" "$PYTHON" scripts/compile_kernels.py

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
)
if imports pytest; then
    imports hypothesis || note 'tests: those that draw their inputs are skipped, hypothesis is missing'
    step tests 8 "$TESTS_S" "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider "${files[@]}"
else
    note 'tests: NOT RUN, pytest is missing'
    status=$((status + 32))
fi

step nvfp4 64 "$((NVFP4_S + MARGIN_S))" \
    "$PYTHON" kernels/benchmarks/nvfp4.py --budget "$NVFP4_S" --out "$OUT"
left=$((LIMIT_S - SECONDS - MARGIN_S))
step benchmark 16 "$((left + MARGIN_S / 2))" \
    "$PYTHON" kernels/benchmarks/run.py --budget "$left" --out "$OUT" "$@"
note "results are in $OUT"
exit "$status"
