"""What the processes of the distributed tests do: ``python worker.py STORE OUT SCENARIOS``.

Every scenario trains the tiny model for a few steps with the parts the training loop uses, and
leaves in OUT what the tests compare: NAME.json (per-step numbers, from rank 0) and
NAME-RANK.safetensors (this rank's parameters, masters, moments and gradients). ``precision.py``
adds its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.runs import built, read_steps
from nemo_hybrid.data.loader import open_blend
from nemo_hybrid.objectives.base import mtp_losses
from nemo_hybrid.objectives.next_token import count_targets
from nemo_hybrid.parallel.dispatch import expert_group_name
from nemo_hybrid.parallel.engine import Engine, prepare_deepspeed
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train import build
from nemo_hybrid.train.run import Run
from nemo_hybrid.train.step import train_step
from parallel import parts, precision
from parallel.equal import STARVED, STEPS, equal_run, masked, optimizer_of, starve


@dataclass(frozen=True)
class Scenario:
    """One way to lay out the same steps."""

    name: str
    optimizer: str = "sgd"
    ep: int = 1
    cp: int = 1
    zero: int = 2
    accumulation: int = 1
    recipe: str = "fp32"
    starved: tuple[int, ...] = STARVED
    options: dict[str, Any] = field(default_factory=dict)
    """Of `equal_run`."""
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
    world, options = replace(world, cp=scenario.cp), scenario.options
    micro = {"micro_batch_size": 8 // (world.readers * scenario.accumulation)}
    config = equal_run(
        store,
        scenario.optimizer,
        **options | {"train": options.get("train", {}) | micro},
        ep=scenario.ep,
        cp=scenario.cp,
        zero=scenario.zero,
        recipe=scenario.recipe,
    )
    config.validate()
    hybrid = config.model.hybrid()
    blend = open_blend(config.data, hybrid)
    with optimizer_of(scenario.optimizer), expert_groups(world, scenario):
        run = built(config, world)
    starve(run.model, scenario.starved)
    break_it(run, scenario.fault)
    zero = run.engine.engine.optimizer
    norms = patch.object(zero, "scaled_global_norm", wraps=zero.scaled_global_norm).start()
    data = read_steps(config, blend, world.reader, world.readers)
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for step in range(STEPS):
        batches = [masked(batch) for batch in next(data)]
        outcome = train_step(run, batches, config.train.lr)
        assert norms.call_count == step + 1, "norms of a gradient are passes over all of it"
        if scenario.optimizer == "sgd":
            tensors |= {
                f"grad{step}|{f.name}|{f.start}": f.tensors["exp_avg"].clone()
                for f in run.engine.fragments()
            }
        rows.append(
            {
                "losses": [outcome.means["loss"], *mtp_losses(outcome.means)],
                "grad_norm": outcome.grad_norm,
                "loads": {name: counts_E.tolist() for name, counts_E in outcome.loads.items()},
                "aux": outcome.means["aux"],
                "hash": outcome.sample_hash,
                "targets": world.gather(
                    sum(int(count_targets(batch, 0)) for batch in batches) * (not world.part),
                ),
            }
        )
    tensors |= {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for fragment in run.engine.fragments():
        for kind, tensor in fragment.tensors.items():
            tensors[f"{kind}|{fragment.name}|{fragment.start}"] = tensor.clone()
    save_file(tensors, out / f"{scenario.name}-{world.rank}.safetensors")
    if world.rank == 0:
        (out / f"{scenario.name}.json").write_text(json.dumps(rows))


@contextmanager
def expert_groups(world: World, scenario: Scenario) -> Iterator[None]:
    """Inside, the fault "wrong group" reduces expert gradients over ranks that hold different
    experts."""
    if scenario.fault != "wrong group":
        yield
        return
    from deepspeed.utils import groups

    prepare_deepspeed(world)
    name = expert_group_name(scenario.ep)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(scenario.ep)
    right = groups._get_expert_data_parallel_group_dict()[name]
    groups._get_expert_data_parallel_group_dict()[name] = groups._get_expert_parallel_group(name)
    yield
    groups._get_expert_data_parallel_group_dict()[name] = right


def break_it(run: Run, fault: str) -> None:
    """Make a deliberate mistake."""
    if fault == "local means":
        run.world = LocalMeans(run.world.rank, run.world.size, run.world.device)
    elif fault == "expert scale":  # divided by the expert-parallel size
        for name, parameter in run.model.named_parameters():
            if ".experts." in name:
                parameter.register_hook(lambda grad: grad / 2)
    elif fault == "first micro-batch":

        class CountsTheFirstTwice(Engine):
            def backward(self, loss: Tensor) -> None:
                boundary = self.engine.is_gradient_accumulation_boundary()
                super().backward(loss if boundary else 2 * loss)

        run.engine.__class__ = CountsTheFirstTwice


def main(store: str, out: str, scenarios: str) -> None:
    torch.set_num_threads(1)
    build.peak_flops = lambda *_: None  # would be measured anew for every scenario
    world = World.start()
    for given in json.loads(scenarios):
        if given.pop("kind", "train") == "train":
            with parts.broken(given.get("fault", "")):
                train(world, Path(store), Path(out), Scenario(**given))
        else:
            precision.run(world, Path(store), Path(out), **given)
    World.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
