"""Time of a step at expert parallel 2 over that at 1, on the same two processes.

    torchrun --nproc_per_node=2 scripts/ep_overhead.py --config FILE [--out FILE] [--KEY VALUE ...]

The run's own steps on its data, fp32 or bf16 as configured, alternately in both layouts; prints the
medians and their ratio. At expert parallel 1 every process computes all experts on its own tokens;
at 2 each computes half of them on the tokens of both, and tokens travel there and back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import replace_file
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.build import build_run
from nemo_hybrid.train.run import Run
from nemo_hybrid.train.step import train_step

WARM_UP = 2
SIZES = (1, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="configuration of a run")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per layout")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given, overrides = parser.parse_known_args()
    world = World.start()
    try:
        if world.size != 2:
            raise UserError(f"two processes are compared, torchrun started {world.size}")
        config = load_config([given.config], overrides)
        seconds = measure(config, world, given.steps)
    except UserError as error:
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if world.rank == 0:
        one, two = (statistics.median(seconds[ep]) for ep in SIZES)
        print(f"{given.steps} steps each, median: EP=1 {one:.4f} s, EP=2 {two:.4f} s")
        print(f"EP=2 over EP=1: {two / one:.3f}")
        if given.out:
            result = {
                "seconds": {f"ep {ep}": seconds[ep] for ep in SIZES},
                "median": {"ep 1": one, "ep 2": two},
                "ratio": two / one,
                "train": asdict(config.train),
                "sequence_length": config.data.sequence_length,
                "precision": config.precision.recipe,
                "model": asdict(Pretrain(config).shape),
                "environment": environment(),
            }
            replace_file(given.out, json.dumps(result, indent=1))
    World.stop()
    return 0


def measure(config: RunConfig, world: World, timed: int) -> dict[int, list[float]]:
    """Seconds of every timed step by expert-parallel size. Raises UserError."""
    runs = {ep: prepare(config, world, ep) for ep in SIZES}
    seconds: dict[int, list[float]] = {ep: [] for ep in SIZES}
    for number in range(WARM_UP + timed):
        for ep, run in runs.items():
            batches = run.data.step(number, run.share)
            dist.barrier()
            began = time.perf_counter()
            train_step(run, batches, config.train.lr)  # ends with numbers on the host
            dist.barrier()
            if number >= WARM_UP:
                seconds[ep].append(time.perf_counter() - began)
    return seconds


def prepare(config: RunConfig, world: World, ep: int) -> Run:
    """The run at one expert-parallel size."""
    own = deepcopy(config)
    own.parallel.ep = ep
    recipe = Pretrain(own)
    recipe.check()
    return build_run(recipe, world, recipe.open_data(world, None))


if __name__ == "__main__":
    sys.exit(main())
