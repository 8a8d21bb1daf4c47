"""A job under torchrun, in the background: its processes by rank, its end, what it left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.processes import HANG_S, TESTS
from nemo_hybrid.train.metrics import read_metrics

MEASURED = ("tokens_per_s", "step_seconds", "data_seconds", "mfu", "memory_gb")
"""Fields of metrics that tell of the machine, not of the training."""
_MARK = "NEMO_HYBRID_TEST_JOB"
# What torchrun itself must not find when a test runs in a job.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """``torchrun --standalone TORCHRUN PROGRAM``; a context manager that leaves no process behind.

    Output of all processes goes to the file ``log``, which is appended to.
    """

    def __init__(
        self, program: Sequence[str | Path], log: Path, size: int = 2, torchrun: Sequence[str] = ()
    ) -> None:
        self.log, self._mark = log, f"{_MARK}={uuid.uuid4()}"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        with log.open("ab") as out:
            self.agent = subprocess.Popen(
                [sys.executable, *launcher, *torchrun, *map(str, program)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        name, _, value = self._mark.partition("=")
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {k: v for k, v in os.environ.items() if k not in _FOREIGN}
        return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), name: value}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def processes(self) -> dict[int, int | None]:
        """The living processes of the job: process id -> rank, None for the agent."""
        found: dict[int, int | None] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                environment = (directory / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue  # ended meanwhile, or not ours
            variables = environment.split("\0")  # empty for a zombie
            if self._mark in variables:
                rank = next((v[5:] for v in variables if v.startswith("RANK=")), None)
                found[int(directory.name)] = None if rank is None else int(rank)
        return found

    def workers(self) -> dict[int, int]:
        """rank -> process id"""
        return {rank: pid for pid, rank in self.processes().items() if rank is not None}

    def kill(self) -> None:
        """kill -9 of everything, until nothing is left."""
        while alive := self.processes():
            for pid in alive:
                kill(pid)
            self.agent.poll()
            time.sleep(0.01)
        self.agent.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = HANG_S) -> int:
        """The agent's exit status. Raises AssertionError with the output after ``timeout`` s."""
        try:
            return self.agent.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text()}") from None

    def until(self, condition: Callable[[], object], timeout: float = HANG_S) -> float:
        """Wait until the condition holds; the seconds it took. Raises AssertionError."""
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            assert waited < timeout, f"not within {timeout} s:\n{self.text()}"
            time.sleep(0.01)
        return time.monotonic() - began


def kill(pid: int) -> None:
    """kill -9 of a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def steps_recorded(run_dir: Path) -> int:
    """The step of the last whole row of metrics."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith(b"}\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def trace(run_dir: Path) -> list[Mapping[str, Any]]:
    """The rows of metrics, without what was measured."""
    rows = [asdict(row) for row in read_metrics(run_dir / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def differences(ours: Path, theirs: Path, step: int) -> list[str]:
    """In what two runs differ up to ``step``: names of files of that checkpoint, bit for bit, and
    rows of metrics. run.yaml, and so the manifest, may hold different paths."""
    a, b = (run_dir / f"checkpoints/step_{step:08d}" for run_dir in (ours, theirs))
    names = {p.name for d in (a, b) for p in d.glob("*")} - {"run.yaml", "manifest.json"}
    assert names, f"neither run has {a.name}"
    found = [n for n in sorted(names) if _content(a / n) != _content(b / n)]
    rows_a, rows_b = trace(ours), trace(theirs)
    if len(rows_a) != len(rows_b):
        found.append(f"{len(rows_a)} and {len(rows_b)} rows of metrics")
    return found + [f"row {x['step']}" for x, y in zip(rows_a, rows_b, strict=False) if x != y]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
