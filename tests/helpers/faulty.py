"""The command line with a fault built in: ``python faulty.py FAULTS COMMAND ...``.

FAULTS is JSON. Global batches count from 1, as they are read. ``rank`` says where the fault
happens (default: every rank)::

    {"nan": [3]}               the loss of these batches becomes NaN on its way back
    {"scale": {"20": 1e4}}     ... is multiplied
    {"delete": [3]}            these batches are not in the data
    {"signal": [5, 15]}        the process sends itself this signal during this batch
    {"hang": 5}                the process sleeps during this batch
    {"hold": [6, "FILE"]}      this batch waits until FILE is there
    {"late_write": 1.0}        the thread that writes checkpoints begins so many seconds late
    {"file_size": [5, 65536]}  from this batch on, and when a checkpoint stands, no file may grow
                               beyond this many bytes
    {"slow_step": 0.2}         every batch takes this many seconds longer; with "until": 7 the first
                               seven that a process reads
    {"slow_write": 0.2}        every file of a checkpoint does
    {"write_beside": [2, 12]}  a checkpoint is complete when two more batches have begun since its
                               first file, or the twelfth one has
    {"events": "FILE"}         rank 0 appends "batch N" and "write NAME" there as they come
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

from nemo_hybrid import cli, files
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Share, Stored
from nemo_hybrid.parallel.engine import Engine
from nemo_hybrid.train import loop, resume


def install(faults: dict[str, Any]) -> None:
    here = faults.get("rank", int(os.environ.get("RANK", 0))) == int(os.environ.get("RANK", 0))
    deleted = set(faults.get("delete", ()))
    current = 0
    begun: dict[Path, int] = {}
    if "late_write" in faults:
        resume.ThreadPoolExecutor = partial(LateExecutor, faults["late_write"])
    train_step, read, backward = loop.train_step, Stored.step, Engine.backward
    sync = files.sync

    def event(text: str) -> None:
        if "events" in faults and os.environ.get("RANK", "0") == "0":
            with open(faults["events"], "a") as file:
                file.write(f"{text}\n")

    def faulty_step(run: Any, *args: Any, **options: Any) -> Any:
        nonlocal current
        current += 1
        event(f"batch {current}")
        if here:
            before_step(faults, current, Path(run.config.run_dir))
        return train_step(run, *args, **options)

    def faulty_read(self: Stored, number: int, share: Share) -> list[Batch]:
        nonlocal current
        current = number
        # Without the deleted batches, counted as if they had never been there.
        left = (batch for batch in itertools.count() if batch + 1 not in deleted)
        return read(self, next(itertools.islice(left, number, None)), share)

    def faulty_backward(engine: Engine, loss: Any) -> None:
        factor = float("nan") if current in faults.get("nan", ()) else 1.0
        factor *= faults.get("scale", {}).get(str(current), 1.0)
        backward(engine, loss * factor if here else loss)

    def faulty_sync(file: IO[bytes]) -> None:
        path = Path(file.name)
        if path.parent.name.startswith(files.TEMPORARY):
            more, last = faults.get("write_beside", (0, 0))
            begun.setdefault(path.parent, current)
            if path.name == "manifest.json":
                while current < min(begun[path.parent] + more, last):
                    time.sleep(0.05)
            event(f"write {path.name}")
            time.sleep(faults.get("slow_write", 0) if here else 0)
        sync(file)

    files.sync = faulty_sync
    loop.train_step = faulty_step
    Stored.step = faulty_read  # type: ignore[method-assign]
    Engine.backward = faulty_backward  # type: ignore[method-assign]


class LateExecutor(ThreadPoolExecutor):
    def __init__(self, delay: float, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.delay = delay

    def submit(self, function: Any, *args: Any) -> Any:
        def late() -> Any:
            time.sleep(self.delay)
            return function(*args)

        return super().submit(late)


def before_step(faults: dict[str, Any], current: int, run_dir: Path) -> None:
    time.sleep(faults.get("slow_step", 0) if current <= faults.get("until", current) else 0)
    at, value = faults.get("signal", (None, None))
    if at == current:
        os.kill(os.getpid(), value)
    if faults.get("hang") == current:
        time.sleep(3600)
    at, value = faults.get("hold", (None, None))
    while at == current and not Path(value).exists():
        time.sleep(0.05)
    at, value = faults.get("file_size", (None, None))
    if at == current:
        while not (run_dir / "checkpoints/latest").exists():
            time.sleep(0.05)
        resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))


if __name__ == "__main__":
    install(json.loads(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
