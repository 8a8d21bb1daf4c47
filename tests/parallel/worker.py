"""What the processes of the distributed tests do: ``python worker.py STORE OUT SCENARIOS``.

Every scenario trains the tiny model for a few steps with the parts the training loop uses, and
leaves in OUT what the tests compare: NAME.json (per-step numbers, from rank 0) and
NAME-RANK.safetensors (this rank's parameters, masters and moments). ``precision.py`` adds its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import precision
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.runs import EQUAL_STEPS, EQUAL_TRAIN, UNCHOSEN, masked, read_steps, starve, tiny_run
from nemo_hybrid.data.loader import open_blend
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.build import build_run
from nemo_hybrid.train.losses import count_targets
from nemo_hybrid.train.step import train_step


@dataclass(frozen=True)
class Scenario:
    """One way to lay out the same three steps."""

    name: str
    ep: int = 1
    zero: int = 2
    accumulation: int = 1
    recipe: str = "fp32"
    starved: tuple[int, ...] = (UNCHOSEN,)
    """Experts that get no token."""
    fault: str = ""
    """A deliberate mistake that the comparison must notice."""


class LocalMeans(World):
    """A world in which every rank takes its own number of targets for the average one."""

    def sum(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int64 and tensor.dim() == 1:
            return tensor * self.size
        return super().sum(tensor)


def train(world: World, store: Path, out: Path, scenario: Scenario) -> None:
    """Run one scenario."""
    micro = 8 // (world.size * scenario.accumulation)
    config = tiny_run(
        store,
        train=EQUAL_TRAIN | {"micro_batch_size": micro},
        ep=scenario.ep,
        zero=scenario.zero,
        recipe=scenario.recipe,
    )
    config.validate()
    hybrid = config.model.hybrid()
    blend = open_blend(config.data, hybrid)
    run = build_run(config, hybrid, world, blend, config.validate_world(world.size))
    starve(run.model, scenario.starved)
    if scenario.fault == "local means":
        run.world = LocalMeans(world.rank, world.size, world.device)
    if scenario.fault == "expert scale":
        for name, parameter in run.model.named_parameters():
            if ".experts." in name:
                parameter.register_hook(lambda grad: grad / 2)
    data = read_steps(config, blend, world.rank, world.size)
    rows: list[dict[str, Any]] = []
    for _ in range(EQUAL_STEPS):
        batches = [masked(batch) for batch in next(data)]
        outcome = train_step(run, batches, config.train.lr)
        rows.append(
            {
                "losses": outcome.losses,
                "aux": outcome.aux,
                "grad_norm": outcome.grad_norm,
                "loads": outcome.loads(),
                "sample_hash": outcome.sample_hash,
                "targets": world.gather(
                    sum(int(count_targets(batch, 0)) for batch in batches),
                ),
            }
        )
    tensors = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for fragment in run.engine.fragments():
        for kind, tensor in fragment.tensors.items():
            tensors[f"{kind}|{fragment.name}|{fragment.start}"] = tensor.clone()
    save_file(tensors, out / f"{scenario.name}-{world.rank}.safetensors")
    if world.rank == 0:
        (out / f"{scenario.name}.json").write_text(json.dumps(rows))


def main(store: str, out: str, scenarios: str) -> None:
    torch.set_num_threads(1)
    world = World.start()
    for given in json.loads(scenarios):
        if given.pop("kind", "train") == "train":
            starved = tuple(given.pop("starved", (UNCHOSEN,)))
            train(world, Path(store), Path(out), Scenario(**given, starved=starved))
        else:
            precision.run(world, Path(store), Path(out), given["zero"])
    World.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
