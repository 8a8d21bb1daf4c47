"""Commands one after the other in one process of their own: what each does once after its start
takes as long as a small run, even in a fork (see `helpers.forks`).

DeepSpeed joins one world per process, which they share.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import NamedTuple

from helpers.processes import TESTS, Process, end, look, start


class Said(NamedTuple):
    status: int
    out: str
    err: str


class Commands:
    """``commands("finetune", "--config", file)`` runs a command in a world of one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self, *words: str | Path) -> Said:
        self._connection.send_bytes(json.dumps([str(word) for word in words]).encode())
        return Said(*json.loads(self._connection.recv_bytes()))


@contextmanager
def commands_in_one_process() -> Iterator[Commands]:
    """Ends with EOFError where a command ends its process."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    with tempfile.TemporaryDirectory() as directory:
        address, said = f"{directory}/socket", Path(directory) / "said"
        process = start([__file__, address], environment, said)
        try:
            with _connect(address, process, said) as connection:
                yield Commands(connection)
        finally:
            end(process)


def _connect(address: str, process: Process, said: Path) -> Connection:
    while True:
        try:
            return Client(address)
        except (FileNotFoundError, ConnectionRefusedError):
            assert look(process) is None, said.with_suffix(".err").read_text()
            time.sleep(0.05)


def _serve(address: str) -> None:
    from nemo_hybrid import cli
    from nemo_hybrid.parallel.world import World

    World.stop = lambda: None  # type: ignore[method-assign,assignment]
    with Listener(address) as listener, listener.accept() as connection:
        while True:
            words = json.loads(connection.recv_bytes())
            out, err = io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                status = cli.main(words)
            answer = [status, out.getvalue(), err.getvalue()]
            connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    _serve(sys.argv[1])
