"""Compile every shipped Triton kernel for GPUs that need not be there, and judge the code.

    python scripts/compile_kernels.py [--arch 90 100] [--only NAME] [--modules MODULE ...]

Prints a row for each kernel, configuration and architecture: registers per thread, bytes of stack
(where spilled registers go), shared memory, tensor memory columns, and the matrix instruction that
was found. Ends with status 1 when a kernel does not compile, lacks the instruction that it
declares, has a matrix product but declares none, needs more shared memory than a block may have, or
spills without a stated reason, and also when a stated reason is no longer needed.

Every compilation has a process of its own, because a compiler that aborts takes its process along.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# The interpreter would take the place of the compiler; Triton reads this when kernels are defined.
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from nemo_kernels import shipped

if TYPE_CHECKING:
    from nemo_kernels.shipped import Shipped

ARCHS = (90, 100)
MAX_SHARED = 232_448
"""Bytes of shared memory that a thread block may use on sm_90 and sm_100."""
MAX_TENSOR_MEMORY = 512
"""Columns of tensor memory of an sm_100 processor."""
IN_PTX = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
HEADER = ("kernel", "configuration", "sm", "regs", "stack", "shared", "tmem", "found", "verdict")


class Job(NamedTuple):
    """A shipped kernel and the architecture to compile it for."""

    item: Shipped
    arch: int

    @property
    def kernel(self) -> str:
        return self.item.kernel.__name__

    @property
    def configuration(self) -> str:
        """Kinds of tensors, constants, warps and stages."""
        kinds = [kind[1:] for kind in self.item.signature.values() if kind.startswith("*")]
        parts = ["/".join(dict.fromkeys(kinds))] if kinds else []
        parts += [f"{name}={value}" for name, value in self.item.constants.items()]
        return " ".join([*parts, f"warps={self.item.num_warps}", f"stages={self.item.num_stages}"])


class Code(NamedTuple):
    """What was found in the code of one kernel; bytes, but tensor memory in columns."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    found: str
    has_dot: bool


def compile_one(job: Job) -> Code:
    """Raises what Triton raises, and ValueError when the declaration misses an argument."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    item, names = job.item, job.item.kernel.arg_names
    declared = {*item.signature, *item.constants}
    wrong = sorted(declared.symmetric_difference(names) | {*item.divisible}.difference(names))
    if wrong:
        raise ValueError(f"arguments declared but not there, or not declared: {', '.join(wrong)}")
    aligned = [
        name for name, kind in item.signature.items() if kind[0] == "*" or name in item.divisible
    ]
    source = ASTSource(
        fn=item.kernel,
        signature={name: item.signature.get(name, "constexpr") for name in names},
        constexprs=item.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    registers, stack = resource_usage(built.asm["cubin"])
    wanted = item.instruction.get(job.arch)
    searched = [wanted] if wanted else [*IN_PTX]
    found = [name for name in searched if IN_PTX.get(name, name) in built.asm["ptx"]]
    return Code(
        registers,
        stack,
        built.metadata.shared,
        built.metadata.tmem_size or 0,
        "".join(found[:1]),
        "tt.dot" in built.asm["ttir"],
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, by the tool that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise ValueError(f"cuobjdump names no registers: {text}")
    return int(usage[1]), int(usage[2])


def faults(job: Job, code: Code) -> list[str]:
    """Why this code may not be shipped; empty when it may."""
    wanted, reason = job.item.instruction.get(job.arch), job.item.spills
    found = []
    if wanted and not code.found:
        found.append(f"no {wanted} in the code")
    if code.has_dot and not wanted:
        found.append("has a matrix product, but declares no instruction")
    if code.shared > MAX_SHARED:
        found.append(f"{code.shared} bytes of shared memory, at most {MAX_SHARED}")
    if code.tensor_memory > MAX_TENSOR_MEMORY:
        found.append(f"{code.tensor_memory} columns of tensor memory, at most {MAX_TENSOR_MEMORY}")
    if code.stack and not reason:
        found.append(f"spills to {code.stack} bytes of stack")
    return found


def stale(jobs: Sequence[Job], codes: Sequence[Code | str]) -> list[str]:
    """Configurations that give a reason for spills and spill on none of their architectures; those
    that were not compiled for all of them are not judged."""
    found = []
    for item in {id(job.item): job.item for job in jobs if job.item.spills}.values():
        judged = [c for job, c in zip(jobs, codes, strict=True) if job.item is item]
        clean = all(isinstance(c, Code) and not c.stack for c in judged)
        if clean and len(judged) == len(item.archs):
            name = f"{item.kernel.__name__} ({Job(item, 0).configuration})"
            found.append(f"{name} does not spill: remove its reason {item.spills!r}")
    return found


def in_processes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Code | str]]:
    """(index, code or what went wrong) of every job, as they end; at most ``workers`` at a time."""
    fork = multiprocessing.get_context("fork")  # imports once, and one abort ends one compilation
    waiting = list(enumerate(jobs))
    running: dict[Any, tuple[int, Any, Any]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            index, job = waiting.pop(0)
            receiver, sender = fork.Pipe(duplex=False)
            log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            process = fork.Process(target=_child, args=(job, sender, log))
            process.start()
            sender.close()
            running[receiver] = (index, process, log)
        for ready in connection.wait([*running]):
            index, process, log = running.pop(ready)
            yield index, _result(ready, process, log)


def _child(job: Job, sender: Any, log: Any) -> None:
    """Compile; a compiler's words and the traceback go to the log."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sender.send_bytes(json.dumps(compile_one(job)).encode())


def _result(receiver: Any, process: Any, log: Any) -> Code | str:
    try:
        result: Code | str = Code(*json.loads(receiver.recv_bytes()))
        process.join()
    except EOFError:
        process.join()
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
        result = f"does not compile (status {process.exitcode}): {' / '.join(lines[-3:])[-300:]}"
    receiver.close()
    log.close()
    return result


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def check(jobs: Sequence[Job], workers: int) -> list[str]:
    """Compile and print the table; returns what is wrong, a line each."""
    results = dict(in_processes(jobs, workers))
    codes = [results[index] for index in range(len(jobs))]
    rows: list[Sequence[str]] = [HEADER]
    problems = []
    for job, code in zip(jobs, codes, strict=True):
        wrong = [code] if isinstance(code, str) else faults(job, code)
        numbers = code[:4] if isinstance(code, Code) else ("", "", "", "")
        found = (code.found or "-") if isinstance(code, Code) else ""
        cells = (job.kernel, job.configuration, job.arch, *numbers, found)
        rows.append((*map(str, cells), "FAIL" if wrong else "ok"))
        problems += [f"{job.kernel} ({job.configuration}) sm_{job.arch}: {w}" for w in wrong]
    print(table(rows))
    return problems + stale(jobs, codes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--only", help="kernels whose name contains this")
    parser.add_argument(
        "--modules", nargs="+", default=shipped.MODULES, help="default: all shipped"
    )
    chosen = parser.parse_args(arguments)
    items = [item for name in chosen.modules for item in import_module(name).shipped()]
    jobs = [
        Job(item, arch)
        for item in items
        for arch in chosen.arch
        if arch in item.archs and (chosen.only or "") in item.kernel.__name__
    ]
    if not jobs:
        parser.error("no shipped kernel fits --only and --arch")
    import triton

    print(f"Triton {triton.__version__}: {len(jobs)} compilations")
    problems = check(jobs, workers=len(os.sched_getaffinity(0)))
    for problem in problems:
        print(f"error: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
