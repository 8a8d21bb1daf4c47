# shellcheck shell=bash
# Sourced by the scripts beside it. make_environment [EXTRA] makes .venv in the repository, or
# brings it up to date, and leaves it alone when pyproject.toml has not changed since.

TORCH_RANGE="$(sed -n 's/^ *"\(torch>=.*\)",$/\1/p' "$ROOT/pyproject.toml")"
CPU_INDEX='https://download.pytorch.org/whl/cpu'
CPU_INDEX_WAIT_S=15
VENV="$ROOT/.venv"

export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The first Python from 3.10 to 3.13 that can make virtual environments; $PYTHON wins.
find_python() {
    local candidate seen=''
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if ! "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            seen+=" $candidate ($("$candidate" --version 2>&1 || true)),"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            seen+=" $candidate (cannot make virtual environments: install python3-venv),"
        else
            # Not the Python of an active virtual environment: a .venv must not depend on that.
            "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
            return
        fi
    done
    fail "Python 3.10 to 3.13 is needed; found:${seen:- none}" \
        'Set PYTHON=/path/to/python to choose one.'
}

# Of versions of torch, one a line, those in the supported range. $1: an interpreter.
supported() {
    "$1" -c '
import re, sys
def release(version): return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
first, end = map(release, sys.argv[1].split(","))
print(*(v for v in sys.stdin.read().split() if first <= release(v) < end), sep="\n")
' "$TORCH_RANGE"
}

# Whether an interpreter imports a torch of the supported range.
has_torch() {
    [[ -n "$("$1" -c 'import torch; print(torch.__version__)' 2>/dev/null | supported "$1")" ]]
}

# The newest CPU build of torch in the range that pip finds, with further options of pip; or nothing.
newest_cpu_torch() {
    { timeout 30 "$VENV/bin/python" -m pip index versions "$@" torch 2>/dev/null || true; } |
        { grep -oE '[0-9.]+\+cpu' || true; } | supported "$VENV/bin/python" | sed -n 1p
}

# Without a GPU, prefer the CPU build of torch: 0.2 GB instead of 3 GB to download. It is asked for by
# its own version, since pip would rather take a plain build of a newer one. Never fatal.
prefer_cpu_torch() {
    local newest from=()
    [[ "$(uname -s)-$(uname -m)" == Linux-x86_64 ]] || return 0
    ! command -v nvidia-smi >/dev/null 2>&1 || return 0
    ! has_torch "$VENV/bin/python" || return 0
    newest="$(newest_cpu_torch)"
    if [[ -z "$newest" ]]; then # pip finds none by itself
        if ! timeout "$CPU_INDEX_WAIT_S" "$VENV/bin/python" -c \
            "import urllib.request as r; r.urlopen('$CPU_INDEX/torch/', timeout=10).read(1)" \
            >/dev/null 2>&1; then
            echo "The CPU builds at $CPU_INDEX cannot be reached; taking torch from pip's own index."
            return 0
        fi
        from=(--extra-index-url "$CPU_INDEX")
        newest="$(newest_cpu_torch "${from[@]}")"
    fi
    if [[ -z "$newest" ]] || ! "$VENV/bin/python" -m pip install --quiet --no-compile \
        "${from[@]}" "torch==$newest"; then
        echo "No CPU build of torch could be installed; taking torch from pip's own index."
    fi
}

make_environment() {
    local extra="${1:-}" python stamp wanted
    stamp="$VENV/.nemo-hybrid-${extra:-base}"
    if [[ -x "$VENV/bin/python" ]] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        wanted="$(stamp_of "$VENV/bin/python")"
        if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
            return
        fi
        echo "Bringing $VENV up to date."
    else
        python="$(find_python)"
        echo "Making $VENV with $("$python" --version)."
        if has_torch "$python"; then
            echo "Using the torch that this Python already has."
            "$python" -m venv --clear --system-site-packages "$VENV"
        else
            "$python" -m venv --clear "$VENV"
        fi
        wanted="$(stamp_of "$VENV/bin/python")"
    fi
    echo "Installing; this takes one to three minutes, more over a slow line."
    prefer_cpu_torch
    "$VENV/bin/python" -m pip install --quiet --no-compile -e "$ROOT${extra:+[$extra]}"
    printf '%s\n' "$wanted" >"$stamp"
    # Every extra contains the base.
    printf '%s\n' "$wanted" >"$VENV/.nemo-hybrid-base"
}

# What an installation depends on: the list of requirements and the place of the checkout.
stamp_of() {
    "$1" - "$ROOT" <<'EOF'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
print(hashlib.sha256((root / "pyproject.toml").read_bytes()).hexdigest(), root)
EOF
}
