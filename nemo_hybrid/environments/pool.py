"""Processes that score, each with one answer at a time, and a deadline for it.

A verifier that hangs is killed with all that it started, one that crashes is started again; either
is a Failure, which is no reward: what cannot be judged is not wrong.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nemo_hybrid.environments import Score, is_own, make
from nemo_hybrid.errors import UserError

_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from nemo_hybrid.environments.child import main; main(int(sys.argv[1]))"
)
_MAKING_S = 120.0
"""Longest time that imports of a user's environment may take."""
_PIECE = 65536


@dataclass(frozen=True)
class Job:
    """An answer that is to be scored; see `Environment.score`."""

    environment: str
    row: Mapping[str, Any]
    text: str
    ended: str


@dataclass(frozen=True)
class Failure:
    """Why an answer has no score."""

    environment: str
    why: str


class Pool:
    """``workers`` processes that hold the environments of a configuration; a context manager.

    ``deadline_s``: of one answer. Raises UserError where an environment cannot be made.
    """

    def __init__(
        self, environments: Mapping[str, Mapping[str, Any]], workers: int, deadline_s: float
    ) -> None:
        for name, options in environments.items():
            if not is_own(options.get("kind")):
                make(name, options)  # a mistake is told at once, and without a process
        self._deadline_s = deadline_s
        self._children = [_Child(environments) for _ in range(workers)]
        try:
            self.fields: dict[str, list[str]] = self._children[0].begin()
        except _Lost as lost:
            self.close()
            raise UserError(f"environments cannot be made: their process {lost}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; they are started again where they are needed."""
        for child in self._children:
            child.end()

    def score(self, jobs: Sequence[Job]) -> list[Score | Failure]:
        """Of every job, in their order."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        found: list[Score | Failure] = [Failure(job.environment, "not scored") for job in jobs]
        for number in range(len(jobs)):
            waiting.put(number)

        def work(child: _Child) -> None:
            with suppress(queue.Empty):
                while True:
                    number = waiting.get_nowait()
                    found[number] = self._score(child, jobs[number])

        threads = [threading.Thread(target=work, args=(child,)) for child in self._children]
        for thread in threads[: len(jobs)]:
            thread.start()
        for thread in threads[: len(jobs)]:
            thread.join()
        return found

    def _score(self, child: _Child, job: Job) -> Score | Failure:
        try:
            child.begin()
            answer = child.ask(vars(job), self._deadline_s)
        except (_Lost, UserError) as error:
            return Failure(job.environment, f"its process {error}")
        if "error" in answer:
            return Failure(job.environment, answer["error"])
        return Score(answer["reward"], answer["parts"], answer["extracted"])


class _Lost(Exception):
    """A process that gave no answer, and has ended."""


class _Child:
    """A process that scores (see `child`), started where it is needed."""

    def __init__(self, environments: Mapping[str, Mapping[str, Any]]) -> None:
        self._environments = environments
        self._process: subprocess.Popen[bytes] | None = None
        self._answers, self._asked, self._rest = -1, 0, b""

    def begin(self) -> dict[str, list[str]]:
        """Start it, if it does not run: the fields that each environment needs. Raises UserError
        or _Lost."""
        if self._process is not None:
            return {}
        self._process, self._answers = _start()
        self._rest = b""
        answer = self.ask({"environments": self._environments}, _MAKING_S)
        if "error" in answer:
            self.end()
            raise UserError(answer["error"])
        return dict(answer["fields"])

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a request. Raises _Lost where there is none in time."""
        self._asked += 1
        line = json.dumps({"number": self._asked, **request}).encode() + b"\n"
        until = time.monotonic() + seconds
        try:
            self._write(line, until)
            while True:
                answer = json.loads(self._line(until))
                if isinstance(answer, dict) and answer.get("number") == self._asked:
                    return answer
        except TimeoutError:
            self.end()
            raise _Lost(f"took longer than {seconds:g} s") from None
        except (OSError, EOFError, ValueError):
            status = self.end()
            raise _Lost(f"ended with status {status}") from None
        except BaseException:
            self.end()  # an answer may be under way that the next request must not get
            raise

    def end(self) -> int | None:
        """Kill it, and what it started; its status, None where there was no such process."""
        process, self._process = self._process, None
        if process is None:
            return None
        status = _ended(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        os.close(self._answers)
        return process.wait() if status is None else status

    def _write(self, line: bytes, until: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        number, left = self._process.stdin.fileno(), memoryview(line)
        while left:
            _wait(until, writer=number)
            with suppress(BlockingIOError):
                left = left[os.write(number, left[:_PIECE]) :]

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._rest:
            _wait(until, reader=self._answers)
            piece = os.read(self._answers, _PIECE)
            if not piece:
                raise EOFError
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The status of a process that has closed its pipes, if it ends by itself."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(0.1)
    return None


def _wait(until: float, reader: int | None = None, writer: int | None = None) -> None:
    """Until something can be read or written. Raises TimeoutError."""
    poll = select.poll()  # which has no limit on numbers of files
    if reader is not None:
        poll.register(reader, select.POLLIN)
    if writer is not None:
        poll.register(writer, select.POLLOUT)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError


def _start() -> tuple[subprocess.Popen[bytes], int]:
    """The process, and the open file of its answers: its standard output is anybody's."""
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            # What this process would import, whatever lies in the working directory.
            [sys.executable, "-c", _START, str(write), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write,),
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # so that all that it starts can be killed with it
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process, read
