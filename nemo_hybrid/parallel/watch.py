"""What ends a process of a run from outside: signals, a lost launcher, a hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

from nemo_hybrid.process import ending, torchrun_listens

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PARENT_LOST = 5
"""Exit status of a process whose launcher died."""
_POLL_S = 1.0
_PATIENCE_S = 120.0
"""Longest wait in a library after a signal: others may write a checkpoint meanwhile."""


class Watch:
    """Guards one process.

    From its making until the process ends: torchrun's workers live in sessions of their own and
    would train on when its agent is killed. They notice the new parent, at a beat or within a
    second, and exit at once. ``launcher`` is the parent's process id when the process began.

    As a context manager, for the main thread, while the process trains:

    - SIGTERM, SIGUSR1 and the first SIGINT (Ctrl-C) only set ``stop_requested``: the loop ends at
      the next step boundary. A second SIGINT ends the process at once, with status 130. Where the
      process waits in a library, a second SIGTERM does too, or two minutes of that.
    - Without a beat for ``hang_timeout_s`` (0: never) the process prints the stacks of all its
      threads and exits with status 1, also where it hangs inside a library.
    """

    def __init__(self, hang_timeout_s: float, launcher: int) -> None:
        self.stop_requested = False
        self._timeout = hang_timeout_s
        # Without torchrun a run may well outlive the shell that started it.
        self._parent = launcher if "TORCHELASTIC_RUN_ID" in os.environ else None
        if self._parent is not None:
            # Where it was gone before ``launcher`` was asked for, so is its store, without which
            # processes would try to meet for as long as they wait for each other.
            if not torchrun_listens():
                _end()
            threading.Thread(target=self._poll, name="watch", daemon=True).start()

    def __enter__(self) -> Watch:
        self._before = {s: signal.signal(s, self._stop) for s in STOP_SIGNALS}
        self._patience_s, ending.patience_s = ending.patience_s, _PATIENCE_S
        self.beat()
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        ending.patience_s = self._patience_s
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def beat(self) -> None:
        """The process is alive, and so is its launcher; call it once per step."""
        self.check_parent()
        if self._timeout:
            # A watchdog in C: it needs no Python lock.
            faulthandler.dump_traceback_later(self._timeout, exit=True, file=2)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        ending.notice()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, _interrupt)

    def _poll(self) -> None:
        while True:
            self.check_parent()
            time.sleep(_POLL_S)

    def check_parent(self) -> None:
        """End this process if its launcher is gone; before anything of a step is recorded."""
        if self._parent is not None and os.getppid() != self._parent:
            _end()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # Not by an exception: Python would wait for the thread that writes a checkpoint.
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _end() -> NoReturn:
    os.write(2, b"the launcher of this process is gone: stopping\n")
    os._exit(PARENT_LOST)
