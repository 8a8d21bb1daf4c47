"""Commands one after the other in one process of their own: importing takes longer than most runs.

DeepSpeed joins one world per process, which they share.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]


class Said(NamedTuple):
    status: int
    out: str
    err: str


class Commands:
    """``commands("finetune", "--config", file)`` runs a command in a world of one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *words: str | Path) -> Said:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process ended"
        return Said(*json.loads(line))


@contextmanager
def commands_in_one_process() -> Iterator[Commands]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Commands(process)
    finally:
        process.kill()
        process.wait()


def _serve() -> None:
    from nemo_hybrid import cli
    from nemo_hybrid.parallel.world import World

    World.stop = lambda: None  # type: ignore[method-assign,assignment]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed past Python goes elsewhere
    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main(json.loads(line))
        answers.write(json.dumps([status, out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
