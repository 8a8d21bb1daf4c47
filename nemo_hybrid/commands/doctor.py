"""`doctor`: what this machine has, what is installed, and which path each operation takes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from nemo_hybrid.commands.command import Command
from nemo_hybrid.terminal import print_table

REQUIRED = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors")
OPTIONAL = (
    "triton", "mamba-ssm", "causal-conv1d", "flash-attn", "transformer-engine", "math-verify",
    "wandb", "trackio",
)  # fmt: skip
"""Distributions, whose modules have their names, but for the hyphens."""
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "sve")
_ON_TORCH = ("torch", "deepspeed", "mamba-ssm", "causal-conv1d", "flash-attn", "transformer-engine")
IMPORT_LIMIT_S = 120
_MARK = "nemo_hybrid doctor: "
"""Begins what a child says, among what the packages print."""
_IMPORT = f"""
import gc, importlib, json, sys
gc.disable()
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
        problem = ""
    except BaseException as error:
        problem = f"does not import: {{type(error).__name__}}: {{error}}"
    print({_MARK!r} + json.dumps(problem), flush=True)
gc.freeze()
"""
"""Without looking for unreachable objects, see BRIEF of the command line."""


class Package(NamedTuple):
    """An installed (or absent) package; problem is why it cannot be imported, empty if it can."""

    name: str
    version: str
    problem: str


def doctor() -> int:
    """Print the report; return 0 when all required packages work, else 1."""
    # Each import takes a core and some memory: two at a time, those that need torch together.
    groups = [[n for n in REQUIRED + OPTIONAL if (n in _ON_TORCH) == on] for on in (True, False)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(probe, group) for group in groups]
        packages = futures[0].result()
        if not any(package.problem for package in packages if package.name == "torch"):
            import torch  # noqa: F401  needed below, and the other core is busy yet
        packages += futures[1].result()
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


def probe(names: Sequence[str]) -> list[Package]:
    """Import the modules of these distributions one after another in a process of its own: they
    share what takes most of the time, and a broken extension may end the process. What comes
    behind such a one is imported in a further process."""
    modules = {name: name.replace("-", "_") for name in names}
    problems = {name: "not installed" for name in names if util.find_spec(modules[name]) is None}
    while left := [name for name in modules if name not in problems]:
        found, ended = _imported([modules[name] for name in left])
        problems |= zip(left, found, strict=False)
        if ended and len(found) < len(left):
            problems[left[len(found)]] = ended
    return [Package(name, _version(name), problems[name]) for name in modules]


def _imported(modules: Sequence[str]) -> tuple[list[str], str]:
    """Of the first modules why each does not import (empty: it does), and how the process ended
    that the next one ended."""
    command = [sys.executable, "-c", _IMPORT, *modules]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_LIMIT_S, check=False
        )
        output, ended = done.stdout, f"does not import: import ended with {done.returncode}"
    except subprocess.TimeoutExpired as e:
        output = (e.stdout or b"").decode()
        ended = f"import took more than {IMPORT_LIMIT_S} s"
    lines = (line.partition(_MARK) for line in output.splitlines())
    return [json.loads(told) for _, mark, told in lines if mark], ended


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


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
    rows.append(("C compiler", c_compiler()))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        rows.append(("Memory limit", f"{int(limit) / 2**30:.1f} GiB for this container"))
    return rows


def c_compiler() -> str:
    """What Triton would build launchers of its kernels with, and whether it can: it looks for it in
    CC, then for gcc and clang."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    needed = "without it Triton's kernels cannot run: install gcc, libc6-dev and python3-dev"
    if compiler is None:
        return f"none; {needed}"
    include = sysconfig.get_path("include")
    command = [compiler, "-shared", "-fPIC", f"-I{include}", "-x", "c", "-", "-o", os.devnull]
    try:
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{compiler} does not run ({error.strerror}); {needed}"
    if done.returncode == 0:
        return f"{compiler}, builds what Triton needs"
    what = next((line for line in done.stderr.splitlines() if "error" in line), "it says nothing")
    return f"{compiler} builds nothing for Python ({what}); {needed}"


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
