"""`doctor`: what this machine has, what is installed, and which path each operation takes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from nemo_hybrid.commands.command import Command
from nemo_hybrid.terminal import print_table

# Distribution and import names.
REQUIRED = {
    "torch": "torch",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "datasets": "datasets",
    "safetensors": "safetensors",
}
OPTIONAL = {
    "triton": "triton",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "flash-attn": "flash_attn",
    "transformer-engine": "transformer_engine",
    "math-verify": "math_verify",
    "wandb": "wandb",
    "trackio": "trackio",
}
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "sve")
IMPORT_LIMIT_S = 120


class Package(NamedTuple):
    """An installed (or absent) package; problem is why it cannot be imported, empty if it can."""

    name: str
    version: str
    problem: str


def doctor() -> int:
    """Print the report; return 0 when all required packages work, else 1."""
    names = REQUIRED | OPTIONAL
    with ThreadPoolExecutor(max_workers=2) as pool:  # each import takes a core and some memory
        packages = list(pool.map(probe, names, names.values()))
    problems = {p.name: p.problem for p in packages}
    states = [(p.name, p.version, p.problem or "works") for p in packages]
    header = ("package", "version", "state")
    print_table(("", ""), machine(), "Machine")
    print_table(header, [s for s in states if s[0] in REQUIRED], "Required packages")
    print_table(header, [s for s in states if s[0] in OPTIONAL], "Optional packages")
    if not problems["torch"]:
        _show_torch()
    broken = [name for name in REQUIRED if problems[name]]
    if broken:
        print(f"Broken: {', '.join(broken)}. Install again with `pip install -e .`")
    return 1 if broken else 0


def probe(name: str, module: str) -> Package:
    """Import a package in a process of its own: a broken extension may end the process."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "-"
    if util.find_spec(module) is None:
        return Package(name, version, "not installed")
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Package(name, version, f"import took more than {IMPORT_LIMIT_S} s")
    if done.returncode == 0:
        return Package(name, version, "")
    last = done.stderr.strip().splitlines()[-1:] or [f"import ended with {done.returncode}"]
    return Package(name, version, f"does not import: {last[0]}")


def machine() -> list[tuple[str, str]]:
    """Python, operating system, CPU, memory and instruction sets, in words."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, words = _cpuinfo("model name"), _cpuinfo("flags|Features").split()
    memory = {m[1]: int(m[2]) for m in re.finditer(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo"))}
    rows = [
        ("Python", f"{platform.python_version()} at {sys.executable}"),
        ("System", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("CPU", f"{usable} usable cores{f', {model}' if model else ''}"),
        ("Instructions", ", ".join(i for i in INSTRUCTION_SETS if i in words) or "unknown"),
    ]
    if "MemTotal" in memory:
        total, free = memory["MemTotal"] / 2**20, memory.get("MemAvailable", 0) / 2**20
        rows.append(("Memory", f"{total:.1f} GiB, {free:.1f} GiB available"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        rows.append(("Memory limit", f"{int(limit) / 2**30:.1f} GiB for this container"))
    return rows


def _show_torch() -> None:
    """What torch was built for, the CUDA devices, and the path of each operation and why."""
    import torch

    from nemo_kernels import backend

    rows = [
        ("Built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"),
        ("CPU kernels", torch.backends.cpu.get_cpu_capability()),
        ("Threads", str(torch.get_num_threads())),
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        about = f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        rows.append((f"CUDA device {i}", about))
    cuda = torch.cuda.is_available()
    print_table(("", ""), rows if cuda else [*rows, ("CUDA devices", "none")], "Torch")
    for device_type in ("cpu", "cuda") if cuda else ("cpu",):
        title = f"Operations on {device_type} tensors"
        print_table(("operation", "path", "reason"), backend.report(device_type), title)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo(names: str) -> str:
    """The first entry of one of these names."""
    found = re.search(rf"^(?:{names})\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else ""


def environment() -> dict[str, Any]:
    """Machine, versions, commit and day, for the result of a measurement."""

    def git(*arguments: str) -> str:
        where = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


COMMANDS = {"doctor": Command(doctor)}
