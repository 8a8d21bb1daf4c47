"""Start the processes of a distributed program the way torchrun does, and wait for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from helpers import forks

TESTS = Path(__file__).parents[1]
GRACE_S = 10.0
"""How long the others may go on after the first process failed. torchrun ends them sooner; here
their own messages are worth the wait."""
HANG_S = 1200.0
"""Nothing that a test starts takes a twentieth of this on an idle machine: what does hangs."""


Process = subprocess.Popen[bytes] | ForkServerProcess


@dataclass(frozen=True)
class Finished:
    """Exit status (negative: killed by that signal) and output of one process."""

    status: int
    stdout: str
    stderr: str


def run_python(
    arguments: Sequence[str | Path],
    size: int = 1,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = HANG_S,
    succeed: bool = True,
    fresh: bool = False,
) -> list[Finished]:
    """Run ``python ARGUMENTS`` in ``size`` processes that can find each other; by rank.

    They are forks (see `helpers.forks`) where there is no GPU, unless they are to be ``fresh``.

    Raises AssertionError with all output when they take longer than ``timeout`` seconds (they are
    killed), and, if ``succeed``, when one of them ends with another status than 0.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as directory:
        outputs = Path(directory)
        processes = [
            start(words, _environment(rank, size, port, environment), outputs / str(rank), fresh)
            for port in [free_port()]
            for rank in range(size)
        ]
        try:
            in_time = _wait(processes, timeout)
        finally:
            statuses = [end(process) for process in processes]
        finished = [
            Finished(
                status,
                (outputs / f"{rank}.out").read_text(errors="replace"),
                (outputs / f"{rank}.err").read_text(errors="replace"),
            )
            for rank, status in enumerate(statuses)
        ]
    assert in_time, f"not finished after {timeout} s:\n{_described(finished)}"
    assert not succeed or not any(f.status for f in finished), _described(finished)
    return finished


def run_command(*words: str | Path, size: int = 1, succeed: bool = True) -> list[Finished]:
    """Run ``python -m nemo_hybrid WORDS`` in ``size`` processes."""
    return run_python(["-m", "nemo_hybrid", *words], size, succeed=succeed)


def start(
    arguments: Sequence[str], environment: Mapping[str, str], output: Path, fresh: bool = False
) -> Process:
    """Start ``python ARGUMENTS``; what it prints goes to ``output`` with suffixes .out and .err."""
    if forks.AVAILABLE and not fresh:
        return forks.fork(arguments, environment, output)
    with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,  # so that its children can be killed with it
        )


def look(process: Process) -> int | None:
    """Its exit status (negative: killed by that signal), None while it runs."""
    return process.exitcode if isinstance(process, ForkServerProcess) else process.poll()


def end(process: Process) -> int:
    """Kill it and those that it started, if it has not ended; its exit status."""
    assert process.pid
    if look(process) is None:
        with contextlib.suppress(ProcessLookupError):  # a fork makes its group after a moment
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    if isinstance(process, subprocess.Popen):
        return process.wait()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _environment(
    rank: int, size: int, port: int, extra: Mapping[str, str] | None
) -> dict[str, str]:
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        **(extra or {}),
    }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: Sequence[Process], timeout: float) -> bool:
    """Whether all ended by themselves, or one failed and the grace period is over."""
    deadline = time.monotonic() + timeout
    failed_at: float | None = None
    while None in (statuses := [look(process) for process in processes]):
        now = time.monotonic()
        if now > deadline:
            return False
        if failed_at is None and any(statuses):
            failed_at = now
        if failed_at is not None and now > failed_at + GRACE_S:
            return True
        time.sleep(0.05)
    return True


def _described(finished: Sequence[Finished]) -> str:
    return "\n".join(
        f"---- rank {rank}, status {f.status}\n{f.stdout[-4000:]}\n{f.stderr[-8000:]}"
        for rank, f in enumerate(finished)
    )
