"""What the processes of test_gradients.py do: ``python gradients.py STORE OUT ZERO``.

One sampled step of the tiny model, its experts divided over the processes. Leaves in OUT this
rank's parts of the gradient, as NAME|START, and the figures of the sample.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.runs import built, read_steps
from nemo_hybrid.data.loader import open_blend
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train import build
from nemo_hybrid.train.step import train_step
from parallel.equal import STARVED, equal_run, masked, optimizer_of, starve


def main(store: Path, out: Path, zero: int) -> None:
    torch.set_num_threads(1)
    build.peak_flops = lambda *_: None
    world = World.start()
    config = equal_run(store, "sgd", train={"micro_batch_size": 2}, ep=world.size, zero=zero)
    config.precision.health_every = 2
    hybrid = config.model.hybrid()
    blend = open_blend(config.data, hybrid)
    with optimizer_of("sgd"):
        run = built(config, world)
    starve(run.model, STARVED)
    parts = {}

    def recorded():
        for fragment, (name, part) in zip(run.engine.fragments(), given(), strict=True):
            parts[f"{name}|{fragment.start}"] = part.clone()
            yield name, part

    given, run.engine.gradients = run.engine.gradients, recorded
    data = read_steps(config, blend, world.rank, world.size)
    batches = [masked(batch) for batch in next(data)]
    run.probe.start_step(2)
    sampled = train_step(run, batches, config.train.lr).low_precision
    run.probe.start_step(3)
    assert train_step(run, batches, config.train.lr).low_precision is None
    save_file(parts, out / f"{zero}-{world.rank}.safetensors")
    (out / f"{zero}-{world.rank}.json").write_text(json.dumps(sampled))
    World.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
