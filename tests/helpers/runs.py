"""Runs of the tiny model: their configuration, and the parts that the training loop builds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.corpus import TINY_MODEL
from nemo_hybrid.config.parallel import ParallelOptions
from nemo_hybrid.config.run import (
    DataOptions,
    ModelOptions,
    PrecisionOptions,
    PretrainOptions,
    RunConfig,
    TrainingConfig,
)
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Blend, Share, Stored

if TYPE_CHECKING:
    from nemo_hybrid.parallel.world import World
    from nemo_hybrid.train.run import Run


def tiny_run(
    store: Path,
    *,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    ep: int = 1,
    cp: int = 1,
    zero: Any = 2,
    recipe: Any = "fp32",
) -> RunConfig:
    """A run of 8 sequences of 32 tokens per step, several documents in each sequence."""
    return RunConfig(
        model=ModelOptions(**TINY_MODEL | (model or {})),
        data=DataOptions(path=str(store), sequence_length=32),
        train=PretrainOptions(
            **{
                "max_steps": 30,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "lr": 5e-3,
                "schedule": "constant",
                "warmup_steps": 0,
                "decay_steps": 0,
                "eval_sequences": 16,
            }
            | (train or {})
        ),
        parallel=ParallelOptions(ep=ep, cp=cp, zero=zero),
        precision=PrecisionOptions(recipe=recipe),
    )


def read_steps(
    config: RunConfig, blend: Blend, rank: int = 0, world_size: int = 1
) -> Iterator[list[Batch]]:
    """The micro-batches of one rank, as the training loop reads them from its first step."""
    train = config.train
    sizes = train.batch_sizes(config.data.sequence_length)
    share = Share(rank, world_size, sizes, train.micro_batch_size)
    data = Stored(blend, sequence_length=config.data.sequence_length, seed=train.seed)
    return (data.step(number, share) for number in count())


def built(config: TrainingConfig, world: World) -> Run:
    """A run of new weights, or those of model.from_hf, ready for its first step."""
    # Here, because it takes seconds.
    from nemo_hybrid.recipes import recipe_of
    from nemo_hybrid.train.build import build_run

    recipe = recipe_of(config)
    return build_run(recipe, world, recipe.open_data(world, None))
