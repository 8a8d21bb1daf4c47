# shellcheck shell=bash
# Sourced by the scripts beside it. make_environment [EXTRA] makes .venv in the repository, or
# brings it up to date, and leaves it alone when pyproject.toml has not changed since.

TORCH_RANGE='torch>=2.11,<2.14'
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

# Whether an interpreter imports a torch of the supported range.
has_torch() {
    "$1" - <<'EOF' >/dev/null 2>&1
import sys, torch
sys.exit(not (2, 11) <= tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 14))
EOF
}

# Without a GPU, prefer the CPU build of torch: 0.2 GB instead of 3 GB to download. It outranks the
# plain build of the same version, so pip only has to be shown where it is. Never fatal.
prefer_cpu_torch() {
    local pip=("$VENV/bin/python" -m pip) offered
    [[ "$(uname -s)-$(uname -m)" == Linux-x86_64 ]] || return 0
    ! command -v nvidia-smi >/dev/null 2>&1 || return 0
    ! has_torch "$VENV/bin/python" || return 0
    offered="$(timeout 30 "${pip[@]}" index versions torch 2>/dev/null || true)"
    if [[ "$offered" =~ 2\.1[1-3]\.[0-9]+\+cpu ]]; then
        return 0 # pip finds a CPU build by itself
    fi
    if ! timeout "$CPU_INDEX_WAIT_S" "$VENV/bin/python" -c \
        "import urllib.request as r; r.urlopen('$CPU_INDEX/torch/', timeout=10).read(1)" \
        >/dev/null 2>&1; then
        echo "The CPU builds at $CPU_INDEX cannot be reached; taking torch from pip's own index."
        return 0
    fi
    "${pip[@]}" install --quiet --no-compile --extra-index-url "$CPU_INDEX" "$TORCH_RANGE" ||
        echo "No CPU build of torch could be installed; taking torch from pip's own index."
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
