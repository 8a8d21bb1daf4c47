"""The command line with a fault built in: ``python faulty.py FAULTS COMMAND ...``.

FAULTS is JSON. Global batches count from 1, as they are read. ``rank`` says where the fault
happens (default: every rank)::

    {"nan": [3]}               the loss of these batches becomes NaN on its way back
    {"scale": {"20": 1e4}}     ... is multiplied
    {"delete": [3]}            these batches are not in the data
    {"signal": [5, 15]}        the process sends itself this signal during this batch
    {"hang": 5}                the process sleeps during this batch
    {"file_size": [5, 65536]}  from this batch on no file may grow beyond this many bytes
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

from nemo_hybrid import cli
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.parallel.engine import Engine
from nemo_hybrid.train import loop


def install(faults: dict[str, Any]) -> None:
    here = faults.get("rank", int(os.environ.get("RANK", 0))) == int(os.environ.get("RANK", 0))
    deleted = set(faults.get("delete", ()))
    current = 0
    train_step, steps, backward = loop.train_step, loop.steps, Engine.backward

    def faulty_step(run: Any, *args: Any, **options: Any) -> Any:
        nonlocal current
        current += 1
        if here:
            before_step(faults, current)
        return train_step(run, *args, **options)

    def faulty_steps(*args: Any, start_step: int, **options: Any) -> Iterator[list[Batch]]:
        nonlocal current
        current = start_step
        # Without the deleted batches, counted as if they had never been there.
        for number, batches in enumerate(steps(*args, start_step=0, **options), 1):
            if number not in deleted and number > start_step + len(deleted & set(range(number))):
                yield batches

    def faulty_backward(engine: Engine, loss: Any) -> None:
        factor = float("nan") if current in faults.get("nan", ()) else 1.0
        factor *= faults.get("scale", {}).get(str(current), 1.0)
        backward(engine, loss * factor if here else loss)

    loop.train_step = faulty_step
    loop.steps = faulty_steps
    Engine.backward = faulty_backward  # type: ignore[method-assign]


def before_step(faults: dict[str, Any], current: int) -> None:
    at, value = faults.get("signal", (None, None))
    if at == current:
        os.kill(os.getpid(), value)
    if faults.get("hang") == current:
        time.sleep(3600)
    at, value = faults.get("file_size", (None, None))
    if at == current:
        resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))


if __name__ == "__main__":
    install(json.loads(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
