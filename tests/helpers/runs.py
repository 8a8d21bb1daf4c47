"""Runs of the tiny model: their configuration, and the parts that the training loop builds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.corpus import TINY_MODEL
from nemo_hybrid.config.run import (
    DataOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    RunConfig,
    TrainOptions,
)
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Blend, steps


def tiny_run(
    store: Path,
    *,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    ep: int = 1,
    zero: Any = 2,
    recipe: Any = "fp32",
) -> RunConfig:
    """A run of 8 sequences of 32 tokens per step, several documents in each sequence."""
    return RunConfig(
        model=ModelOptions(**TINY_MODEL | (model or {})),
        data=DataOptions(path=str(store), sequence_length=32),
        train=TrainOptions(
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
        parallel=ParallelOptions(ep=ep, zero=zero),
        precision=PrecisionOptions(recipe=recipe),
    )


def read_steps(
    config: RunConfig, blend: Blend, rank: int = 0, world_size: int = 1
) -> Iterator[list[Batch]]:
    """The micro-batches of one rank, as the training loop reads them from its first step."""
    return steps(
        blend,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=rank,
        world_size=world_size,
        start_step=0,
        workers=0,
        seed=config.train.seed,
    )
