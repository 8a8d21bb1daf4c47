"""What the system tells a process: which of how many it is, and that it is to end."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from nemo_hybrid.errors import UserError

_MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
_LAST_PORT = 65535
_OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
"""Variables of mpirun and srun: how many processes, and which of them. A Slurm batch script, which
is one process, has SLURM_NTASKS too."""
TOGETHER = ("pretrain", "finetune", "rl", "eval", "rollout")
"""Commands that several processes may run together."""
_TORCHRUN = "torchrun --nproc_per_node=N -m nemo_hybrid ..."


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number of this process and how many there are, as torchrun's variables say; 0 and 1 without.

    Raises UserError where they say what cannot be, such as what another program left over, and
    where something else than torchrun started several processes, which could not meet.
    """
    rank, size = number_of(environment, "RANK", 0), number_of(environment, "WORLD_SIZE", 1)
    missing = [name for name in _MEETING_PLACE if not environment.get(name)]
    if not environment.get("RANK") and not environment.get("WORLD_SIZE"):
        for many, which in _OTHER_LAUNCHERS.items():
            count, number = number_of(environment, many, 1), number_of(environment, which, 0)
            if count > 1 or number > 0:
                raise UserError(
                    f"{many if count > 1 else which} says that this is one of several processes, "
                    f"which cannot meet without torchrun: start them with {_TORCHRUN}, or unset it"
                )
    if (rank, size) == (0, 1):
        return rank, size
    said = f"RANK and WORLD_SIZE say that this is process {rank} of {size}"
    if rank >= size:
        raise UserError(f"{said}: start it with {_TORCHRUN}, or unset both")
    if missing:
        raise UserError(
            f"{said}, which cannot meet without {' and '.join(missing)}: start them with "
            f"{_TORCHRUN}, or unset RANK and WORLD_SIZE"
        )
    if (port := number_of(environment, "MASTER_PORT", 0)) > _LAST_PORT:
        raise UserError(f"MASTER_PORT is {port}, which is no port: use torchrun, or unset it")
    return rank, size


def torchrun_listens() -> bool:
    """Whether torchrun's agent, whose variables these are, keeps the store where processes meet.
    True where that cannot be told, or where there is none."""
    place = [os.environ.get(name) for name in _MEETING_PLACE]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not all(place):
        return True
    try:
        socket.create_connection((place[0], number_of(os.environ, "MASTER_PORT", 0)), 1.0).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # slow or not resolved here: the connection that counts will tell
    return True


def number_of(environment: Mapping[str, str], name: str, default: int) -> int:
    """What a variable says, or the default. Raises UserError for what is no number."""
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name} is {text!r}, which is no number: use torchrun, or unset it")
    return int(text)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for unreachable cycles of objects. While libraries are imported
    there are hardly any, and looking at all that is there, again and again, takes up to a second.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Ending:
    """Whether the main thread sees a signal, and how long it may take to."""

    def __init__(self) -> None:
        self.patience_s = 5.0
        self.leaving_s = 30.0
        """For what is tidied up on the way out; a library that catches every exception while it is
        imported may have taken the signal's, too."""
        self.noticed_at = 0.0

    def notice(self) -> None:
        """For a handler that lets its process go on."""
        self.noticed_at = time.monotonic()


ending = Ending()
_ASKED = (signal.SIGINT, signal.SIGTERM)
_SAME_S = 1.0  # a signal that comes from several sides at once is one


@contextmanager
def ended_when_asked() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the process also while it waits in a library.

    Python's handlers run between two instructions of the main thread, and so not during a
    rendezvous or a collective. Another thread hears of every signal at once. It ends the process,
    with 128 + the signal as status, if the main thread stands still for `Ending.patience_s`, has
    not left after `Ending.leaving_s`, or at a second signal. For the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    main = threading.get_ident()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader, main), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _listen(reader: int, main: int) -> None:
    while number := os.read(reader, 1):
        if number[0] in _ASKED:
            _wait_for(main, number[0], reader)
    os.close(reader)


def _wait_for(main: int, number: int, reader: int) -> None:
    """Until the main thread has left, or a handler lets it go on; else end the process."""
    began, place, moved = time.monotonic(), _place(main), False
    while ending.noticed_at < began - _SAME_S:
        moved = moved or _place(main) != place
        waited = time.monotonic() - began
        again = bool(select.select([reader], [], [], 0.05)[0]) and os.read(reader, 1)
        if again == b"":
            return
        second = again and again[0] in _ASKED and waited > _SAME_S
        if second or waited > (ending.leaving_s if moved else ending.patience_s):
            os.write(2, b"interrupted\n" if moved else b"interrupted while waiting\n")
            os._exit(128 + number)


def _place(main: int) -> tuple[FrameType | None, int]:
    frame = sys._current_frames().get(main)
    return frame, frame.f_lasti if frame else 0
