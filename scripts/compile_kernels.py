"""Compile every shipped Triton kernel for GPUs that need not be there, and judge the code.

    python scripts/compile_kernels.py [--arch 90 100] [--only NAME] [--modules MODULE ...]

What is compiled is what the calls in ``kernel_launches`` launch, in the forms that Triton gives it.
Prints a row for each kernel, configuration and architecture: registers per thread, bytes of stack
(where spilled registers go), shared memory, tensor memory columns, and the instruction that its
matrix products need if it was found. Ends with status 1 when a kernel does not compile, lacks that
instruction, needs more shared memory than a block may have, or spills.

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

if TYPE_CHECKING:
    from nemo_kernels.launch import Launch

ARCHS = (90, 100)
MAX_SHARED = 232_448
"""Bytes of shared memory that a thread block may use on sm_90 and sm_100."""
MAX_TENSOR_MEMORY = 512
"""Columns of tensor memory of an sm_100 processor."""
IN_PTX = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
HEADER = ("kernel", "configuration", "sm", "regs", "stack", "shared", "tmem", "found", "verdict")


class Job(NamedTuple):
    """A launch, the architecture to compile it for, and its configuration: kinds of tensors,
    constants, warps and stages."""

    launch: Launch
    arch: int
    configuration: str

    @property
    def kernel(self) -> str:
        return str(self.launch.kernel.__name__)


class Code(NamedTuple):
    """What was found in the code of one kernel; bytes, but tensor memory in columns."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    wanted: str
    """The instruction for its matrix products; empty: it has none."""
    found: bool


class Absent(NamedTuple):
    """Stands where Triton looks for the driver of a GPU."""

    arch: int

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # under which Triton keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0


def warmed_up(launch: Launch, arch: int) -> Any:
    """What Triton compiles at this launch, without running it."""
    from triton.runtime import driver

    driver.set_active(Absent(arch))
    return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)


def jobs_of(launches: Iterator[tuple[Launch, tuple[int, ...]]], archs: Sequence[int]) -> list[Job]:
    """Launches that differ for the compiler, by what it would be given."""
    from triton import knobs

    jobs: dict[tuple[object, ...], Job] = {}

    def note(fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        key = (fn.module, fn.name, arch, compile["key"])
        jobs.setdefault(key, Job(launch, arch, configuration(launch.kernel.arg_names, compile)))
        return True  # compile nothing

    knobs.runtime.jit_cache_hook = note
    for launch, on in launches:
        for arch in [arch for arch in archs if arch in on]:
            warmed_up(launch, arch)
    knobs.runtime.jit_cache_hook = None
    return [*jobs.values()]


def configuration(names: Sequence[str], given: dict[str, Any]) -> str:
    kinds = [kind[1:] for kind in given["signature"].values() if kind.startswith("*")]
    parts = ["/".join(dict.fromkeys(kinds))] if kinds else []
    parts += [f"{names[place]}={value}" for (place,), value in given["constants"].items()]
    return " ".join([*parts, f"warps={given['num_warps']}", f"stages={given['num_stages']}"])


def compile_one(job: Job) -> Code:
    """Raises what Triton raises."""
    built = warmed_up(job.launch, job.arch)
    registers, stack = resource_usage(built.asm["cubin"])
    wanted = instruction(built.asm["ttir"], job.arch)
    found = bool(wanted) and IN_PTX.get(wanted, wanted) in built.asm["ptx"]
    memory = (built.metadata.shared, built.metadata.tmem_size or 0)
    return Code(registers, stack, *memory, wanted, found)


def instruction(ttir: str, arch: int) -> str:
    """The instruction for the matrix products in Triton's code; empty where there is none."""
    product = re.search(r"tt\.dot(\w*) .*: tensor<[\dx]*x(\w+)>", ttir)
    if product is None:
        return ""
    if product[1]:
        return "kind::mxf4nvf4"
    # fp32 would be rounded by matrix instructions.
    return "fma.rn.f32" if product[2] == "f32" else {90: "wgmma", 100: "tcgen05"}[arch]


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


def faults(code: Code) -> list[str]:
    """Why this code may not be shipped; empty when it may."""
    found = []
    if code.wanted and not code.found:
        found.append(f"no {code.wanted} in the code")
    if code.shared > MAX_SHARED:
        found.append(f"{code.shared} bytes of shared memory, at most {MAX_SHARED}")
    if code.tensor_memory > MAX_TENSOR_MEMORY:
        found.append(f"{code.tensor_memory} columns of tensor memory, at most {MAX_TENSOR_MEMORY}")
    if code.stack:
        found.append(f"spills to {code.stack} bytes of stack")
    return found


def in_processes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Code | str]]:
    """(index, code or what went wrong) of every job, as they end; at most ``workers`` at a time."""
    from triton.runtime.cache import triton_key

    triton_key()  # a digest of the whole compiler, remembered; else every process makes its own
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
    rows: list[Sequence[str]] = [HEADER]
    problems = []
    for job, code in ((job, results[index]) for index, job in enumerate(jobs)):
        wrong = [code] if isinstance(code, str) else faults(code)
        numbers = code[:4] if isinstance(code, Code) else ("", "", "", "")
        found = (code.wanted if code.found else "-") if isinstance(code, Code) else ""
        cells = (job.kernel, job.configuration, job.arch, *numbers, found)
        rows.append((*map(str, cells), "FAIL" if wrong else "ok"))
        problems += [f"{job.kernel} ({job.configuration}) sm_{job.arch}: {w}" for w in wrong]
    print(table(rows))
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--only", help="kernels whose name contains this")
    parser.add_argument(
        "--modules", nargs="+", default=["kernel_launches"], help="default: all shipped"
    )
    chosen = parser.parse_args(arguments)
    launches = (
        (launch, archs)
        for name in chosen.modules
        for launch, archs in import_module(name).launches()
        if (chosen.only or "") in launch.kernel.__name__
    )
    jobs = jobs_of(launches, chosen.arch)
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
