"""What ends a process of a run from outside: signals, a lost launcher, a hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PARENT_LOST = 5
"""Exit status of a process whose launcher died."""
_POLL_S = 1.0


class Watch:
    """Guards one process while it trains; a context manager, for the main thread.

    - SIGTERM and SIGUSR1 only set ``stop_requested``: the loop ends at the next step boundary.
    - torchrun's workers live in process groups of their own and would train on when its agent is
      killed. They notice the new parent, at a beat or within a second, and exit at once.
    - Without a beat for ``hang_timeout_s`` (0: never) the process prints the stacks of all its
      threads and exits with status 1, also where it hangs inside a library.
    """

    def __init__(self, hang_timeout_s: float) -> None:
        self.stop_requested = False
        self._timeout = hang_timeout_s
        # Without torchrun a run may well outlive the shell that started it.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        self._before = {s: signal.signal(s, self._stop) for s in STOP_SIGNALS}
        if self._parent is not None:
            threading.Thread(target=self._poll, name="watch", daemon=True).start()
        self.beat()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
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

    def _poll(self) -> None:
        while not self._done.wait(_POLL_S):
            self.check_parent()

    def check_parent(self) -> None:
        """End this process if its launcher is gone; before anything of a step is recorded."""
        if self._parent is not None and os.getppid() != self._parent:
            os.write(2, b"the launcher of this process is gone: stopping\n")
            os._exit(PARENT_LOST)
