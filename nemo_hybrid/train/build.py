"""The parts of a run, put together before its first step."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_hybrid.data.loader import Share
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.recompute import recompute_layers
from nemo_hybrid.parallel.context import SequenceShards
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.parallel.engine import Engine, prepare_deepspeed
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.precision.health import Probe
from nemo_hybrid.train.flops import peak_flops
from nemo_hybrid.train.guard import Guard
from nemo_hybrid.train.optim import parameter_groups
from nemo_hybrid.train.run import Data, Recipe, Run


def build_run(recipe: Recipe, world: World, data: Data, checkpoint: Path | None = None) -> Run:
    """Model, engine and all else, on every rank. ``checkpoint``: one that will be restored.

    Raises UserError on every rank.
    """
    config, shape = recipe.config, recipe.shape
    accumulation = config.validate_world(world.size)
    assert world.cp == config.parallel.cp, "the world was started with another layout"
    prepare_deepspeed(world)
    torch.manual_seed(config.train.seed)
    ep = config.parallel.ep
    dispatcher = AllToAllDispatcher(shape.n_routed_experts, ep, world.rank) if ep > 1 else None
    sequence = SequenceShards.of(world) if world.cp > 1 else None
    model = HybridLM(shape, dispatcher=dispatcher, sequence=sequence, seed=config.train.seed)
    train = config.train
    recompute_layers(model, train.recompute, train.tile, train.offload)
    trained = recipe.prepare(model, world, resumed=checkpoint is not None)
    dtype = policy.weight_dtype(config.precision)
    model.to(world.device, dtype)
    products = [name for name, m in model.named_modules() if hasattr(m, "low_precision")]
    probe = Probe(products, config.precision.health_every, world.device)
    precision = policy.Precision(
        model,
        config.precision,
        shape,
        seed=config.train.seed,
        rank=world.rank,
        device_type=world.device.type,
        probe=probe,
    )
    objective = recipe.objective(model)
    if world.cp > 1:
        objective.check_divided()
    groups = parameter_groups(model, config.train)
    engine = Engine(objective, model, groups, config, world, accumulation, dispatcher)
    engine.seed_masters(trained.masters)
    # Measured by all ranks at once where it has to be measured: they share the cores in training.
    # The formula of the work per token is that of training everything.
    frozen = (name for name, p in model.named_parameters() if not p.requires_grad)
    all_trained = all(".gate." in name for name in frozen)
    run = Run(
        recipe=recipe,
        world=world,
        share=Share(
            world.reader,
            world.readers,
            config.train.batch_sizes(config.data.sequence_length),
            config.train.micro_batch_size,
            world.cp,
            world.part,
        ),
        data=data,
        model=model,
        weights=trained.weights,
        objective=objective,
        engine=engine,
        guard=Guard(config.guard.window, recipe.guard()),
        precision=precision,
        probe=probe,
        peak=peak_flops(world.device.type, dtype) if all_trained else None,
    )
    recipe.begin(run)
    return run
