"""`launch`: a command in several processes of this machine.

torchrun does that too, and more: several nodes, restarts. But it ends with a report of 30 lines
below what the command said, and with status 1 whatever the processes ended with; and it cannot be
told to pass a signal on and wait for what comes of it. Here the command's line is the last, its
status is the status, and Ctrl-C reaches every process once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import CHECKED, CommandOptions, PositiveInt
from nemo_hybrid.config.words import help_text, options_of, read_options
from nemo_hybrid.errors import UserError
from nemo_hybrid.process import TOGETHER

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_GRACE_S = 30.0
"""For the others to end, too, when one has, before they are killed."""
_STOPPED = 4
_SAID = (2, 3, _STOPPED, 5, 130)
"""Statuses of processes that gave the reason themselves."""


@dataclass(config=CHECKED)
class LaunchOptions(CommandOptions):
    """Start a command in several processes of this machine."""

    nproc: PositiveInt
    """Processes, one per GPU."""


class Launch:
    """Reads its own options up to the word that names a command, whose own ones follow."""

    def start(self, name: str, words: Sequence[str]) -> int:
        at = next((i for i, word in enumerate(words) if word in TOGETHER), len(words))
        nproc = read_options(LaunchOptions, words[:at]).nproc
        if at == len(words):
            raise UserError(f"{name} needs a command: {', '.join(TOGETHER)}")
        return launch(nproc, [sys.executable, "-m", "nemo_hybrid", *words[at:]])

    def known(self) -> dict[str, Any]:
        """Type by option, and the commands, which stand behind them."""
        return {**options_of(LaunchOptions), **dict.fromkeys(TOGETHER)}

    def help(self, prog: str, summary: str, statuses: str) -> str:
        """All options and their meaning."""
        usage = f"{prog} --nproc N {{{','.join(TOGETHER)}}} [OPTIONS OF THE COMMAND]"
        return help_text(prog, summary, {"options": LaunchOptions}, statuses, usage)


def launch(nproc: int, command: Sequence[str]) -> int:
    """Run a command in processes that know of each other as torchrun's do. Returns the status of
    the one that ended first with another than 0."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    meeting |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **meeting}
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        for rank in range(nproc):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a session of its own: the terminal's Ctrl-C comes to this process alone.
            process = subprocess.Popen(command, env=environment | own, start_new_session=True)
            processes.append(process)
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()  # which has no effect on one that has ended
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    rank, status, deadline = 0, 0, float("inf")
    while True:
        living = [process for process in processes if process.poll() is None]
        ended = ((r, p.returncode) for r, p in enumerate(processes) if p.returncode)
        if not status and (first := next(ended, None)):
            rank, status = first
            deadline = time.monotonic() + _GRACE_S
            for process in living if status != _STOPPED else ():  # those stop by themselves
                process.terminate()
        if not living or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if status and status not in _SAID:
        how = f"with status {status}" if status > 0 else f"by {signal.Signals(-status).name}"
        print(f"process {rank} ended {how}", file=sys.stderr, flush=True)
    return status if status >= 0 else 128 - status


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


COMMANDS = {"launch": Launch()}
