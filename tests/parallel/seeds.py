"""What the processes of test_seeds.py do: ``python seeds.py STORE OUT``.

Whole runs in NVFP4, in which the guard passes over the second batch. Of each, NAME-RANK.json holds
for every batch which seeds were asked for and what was quantized.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from helpers.runs import tiny_run
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.objectives.base import mtp_losses
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision.health import Probe
from nemo_hybrid.precision.operands import Streams
from nemo_hybrid.precision.policy import Precision
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train import build, loop
from nemo_hybrid.train.guard import Guard
from nemo_hybrid.train.run import Run
from nemo_kernels.lowp.operand import Rounding
from parallel.equal import ALL_OF_RANK_1, starve
from train.low_precision import DIVISIBLE

ACCUMULATION, PASSED_OVER, BATCHES = 2, 2, 3
FORMATS = {
    "*.q_proj": "nvfp4/bf16/bf16",
    "*.k_proj": "bf16/nvfp4/mxfp8",
    "*.o_proj": "bf16/bf16/nvfp4",
    "mtp.*": "nvfp4",
}
RUNS: dict[int, dict[str, tuple[int, tuple[int, ...]]]] = {
    # name: seed, experts that get no token
    1: {"plain": (18, ()), "other seed": (19, ())},
    2: {"plain": (18, ()), "starved": (18, ALL_OF_RANK_1)},
}


def seeded_run(store: Path, size: int, seed: int = 18) -> RunConfig:
    """Every process has experts of its own."""
    train = {
        "seed": seed,
        "max_steps": BATCHES - 1,
        "micro_batch_size": 8 // (size * ACCUMULATION),
        "eval_sequences": 0,
    }
    config = tiny_run(store, model=DIVISIBLE, train=train, ep=size, recipe="nvfp4_super")
    config.data.sequence_length = 16
    config.precision.formats = dict(FORMATS)
    config.precision.health_every = 1
    return config


@contextmanager
def recorded(starved: tuple[int, ...]) -> Iterator[list[dict[str, Any]]]:
    """Gives a list to which every batch inside adds what it did."""
    batches: list[dict[str, Any]] = []
    steps: list[int] = []
    make, judge, start = Streams.seed, Guard.judge, Precision.start_step
    built, train_step = loop.build_run, loop.train_step

    def seed(use: tuple[object, ...], operand: str) -> int:
        value = make(use, operand)
        layer = use[5]  # behind what Streams.next_use puts before it
        batches[-1]["asked"].append((layer, operand, value))
        return value

    def quantized(
        self: Probe, name: str, role: str, x: Tensor, how: Rounding, columnwise: bool, *_: Any
    ) -> None:
        batches[-1]["quantized"].append((name, role, columnwise, how.seed))

    def start_step(self: Precision, step: int, batch: int) -> None:
        steps.append(step)
        start(self, step, batch)

    def stepped(run: Run, *args: Any, **options: Any) -> Any:
        batches.append({"step": steps[-1], "asked": [], "quantized": []})
        outcome = train_step(run, *args, **options)
        losses = [outcome.means["loss"], *mtp_losses(outcome.means)]
        batches[-1] |= {"losses": losses, "objection": outcome.objection}
        batches[-1]["loads"] = {name: c.tolist() for name, c in outcome.loads.items()}
        return outcome

    def judged(self: Guard, loss: float, norm: float, *words: str) -> str | None:
        return judge(self, math.nan if len(batches) == PASSED_OVER else loss, norm, *words)

    def build_run(*args: Any, **options: Any) -> Run:
        run = built(*args, **options)
        starve(run.model, starved)
        return run

    with ExitStack() as stack:
        for where, name, what in (
            (Streams, "seed", staticmethod(seed)),
            (Probe, "operand", quantized),
            (Precision, "start_step", start_step),
            (Guard, "judge", judged),
            (loop, "train_step", stepped),
            (loop, "build_run", build_run),
            (loop, "write_plots", lambda _: None),
            (build, "peak_flops", lambda *_: None),
            (World, "stop", lambda: None),  # DeepSpeed joins one world per process
        ):
            stack.enter_context(mock.patch.object(where, name, what))
        yield batches


def main(store: Path, out: Path) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, (seed, starved) in RUNS[size].items():
        config = seeded_run(store, size, seed)
        config.run_dir = str(out / name)
        with recorded(starved) as batches:
            loop.train(Pretrain(config), os.getppid())
        (out / f"{name}-{rank}.json").write_text(json.dumps(batches))
    World.stop()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
