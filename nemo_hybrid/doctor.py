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
    "wandb": "wandb",
}
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "sve")
IMPORT_LIMIT_S = 120


class Package(NamedTuple):
    """An installed (or absent) package; problem is why it cannot be imported, empty if it can."""

    name: str
    version: str
    problem: str


class Section(NamedTuple):
    """A titled table of the report."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def doctor() -> int:
    """Print the report; return 0 when all required packages work, else 1."""
    names = REQUIRED | OPTIONAL
    with ThreadPoolExecutor(max_workers=2) as pool:  # each import takes a core and some memory
        packages = list(pool.map(probe, names, names.values()))
    problems = {p.name: p.problem for p in packages}
    states = [(p.name, p.version, p.problem or "works") for p in packages]
    header = ("package", "version", "state")
    _show(Section("Machine", ("", ""), machine()))
    _show(Section("Required packages", header, [s for s in states if s[0] in REQUIRED]))
    _show(Section("Optional packages", header, [s for s in states if s[0] in OPTIONAL]))
    if not problems["torch"]:
        _show(Section("Torch", ("", ""), torch_build()))
        for device_type in _device_types():
            title = f"Operations on {device_type} tensors"
            _show(Section(title, ("operation", "path", "reason"), operations(device_type)))
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


def machine() -> list[tuple[str, ...]]:
    """Python, operating system, CPU, memory and instruction sets, in words."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", cpuinfo, re.MULTILINE)
    words = flags[1].split() if flags else []
    memory = {m[1]: int(m[2]) for m in re.finditer(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo"))}
    rows: list[tuple[str, ...]] = [
        ("Python", f"{platform.python_version()} at {sys.executable}"),
        ("System", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("CPU", f"{usable} usable cores{f', {model[1]}' if model else ''}"),
        ("Instructions", ", ".join(i for i in INSTRUCTION_SETS if i in words) or "unknown"),
    ]
    if "MemTotal" in memory:
        total, free = memory["MemTotal"] / 2**20, memory.get("MemAvailable", 0) / 2**20
        rows.append(("Memory", f"{total:.1f} GiB, {free:.1f} GiB available"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        rows.append(("Memory limit", f"{int(limit) / 2**30:.1f} GiB for this container"))
    return rows


def torch_build() -> list[tuple[str, ...]]:
    """What torch was built for, and the name, capability and memory of each CUDA device."""
    import torch

    rows: list[tuple[str, ...]] = [
        ("Built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"),
        ("CPU kernels", torch.backends.cpu.get_cpu_capability()),
        ("Threads", str(torch.get_num_threads())),
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        about = f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        rows.append((f"CUDA device {i}", about))
    return rows if torch.cuda.is_available() else [*rows, ("CUDA devices", "none")]


def operations(device_type: str) -> list[tuple[str, ...]]:
    """Operation, the path it takes on tensors of a device type, and why."""
    from nemo_kernels import backend

    return [*backend.report(device_type)]


def _device_types() -> tuple[str, ...]:
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _show(section: Section) -> None:
    """A table on a terminal, aligned plain lines elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        print(f"{section.title}:")
        widths = [max(len(cell) for cell in column) for column in zip(*section.rows, strict=True)]
        for row in section.rows:
            padded = "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            print(f"  {padded.rstrip()}")
        return
    table = Table(title=section.title, title_justify="left", show_header=any(section.header))
    for name in section.header:
        table.add_column(name, overflow="fold")
    for row in section.rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def environment() -> dict[str, Any]:
    """Machine, versions, commit and day, for the result of a measurement."""

    def git(*arguments: str) -> str:
        where = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
