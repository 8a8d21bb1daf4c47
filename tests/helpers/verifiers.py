"""A verifier of a user, which does whatever a row says before it scores."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any


class Faulty:
    fields = ("answer",)

    def __init__(self, reward: float = 1.0) -> None:
        self.reward = reward

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Any:
        getattr(self, row.get("fault", "none"))()
        return row.get("reward", self.reward * (text == row["answer"]))

    def none(self) -> None:
        pass

    def spin(self) -> None:
        while True:
            pass

    def deaf(self) -> None:
        """Hangs, and takes no heed of being asked to end."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(3600)

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(self) -> None:
        os._exit(0)

    def quit(self) -> None:
        sys.exit("enough")

    def fail(self) -> None:
        raise RuntimeError("a defect")

    def interrupt(self) -> None:
        raise BaseException("no Exception")

    def speak(self) -> None:
        print('{"number": 1, "reward": 1.0}', flush=True)
        print("noise", file=sys.stderr, flush=True)
        os.write(1, b"more noise\n")

    def fork(self) -> None:
        """Both go on; neither waits for the other."""
        os.fork()

    def leave_behind(self) -> None:
        """A child that holds all open files and outlives its parent."""
        if not os.fork():
            time.sleep(3600)
            os._exit(0)

    def leave_behind_and_crash(self) -> None:
        self.leave_behind()
        self.crash()

    def listen(self) -> None:
        """Reads what is not meant for it."""
        sys.stdin.read()


class Unmade:
    def __init__(self) -> None:
        raise ValueError("no model of the judge")


class Mute:
    pass
