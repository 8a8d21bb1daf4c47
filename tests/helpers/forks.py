"""Programs in processes forked from one that has imported what they import.

Importing takes longer than most programs of the tests run. Each is a process all the same, with its
own id, group, signals and exit status. What Python does at its very end differs: a fork leaves
without the functions of ``atexit``. And runs draw no plots, which takes longer than training does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

AVAILABLE = not torch.cuda.is_available()
"""CUDA does not work in forks of a process that has asked for its devices."""
# All that a training run imports on the way.
_IMPORTED = (
    "nemo_hybrid.cli",
    "nemo_hybrid.train.loop",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "torch._inductor.config",
)


def fork(
    arguments: Sequence[str], environment: Mapping[str, str], output: Path
) -> ForkServerProcess:
    """Start ``python ARGUMENTS``; what it prints goes to ``output`` with suffixes .out and .err."""
    process = _context().Process(target=_program, args=(arguments, dict(environment), output))
    process.start()
    return process


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    return context


def _program(arguments: Sequence[str], environment: dict[str, str], output: Path) -> None:
    from nemo_hybrid.train import loop  # not before: it takes seconds

    os.setsid()
    for number, suffix in ((1, ".out"), (2, ".err")):
        with output.with_suffix(suffix).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    loop.write_plots = lambda run_dir: []
    first, *others = arguments
    if first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *others]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
