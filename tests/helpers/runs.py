"""Runs of the tiny model: their configuration, and the parts that the training loop builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.corpus import TINY_MODEL
from nemo_hybrid.config import (
    DataOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    RunConfig,
    TrainOptions,
)
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Blend, steps
from nemo_hybrid.model.hybrid import HybridLM

EQUAL_STEPS = 3
EQUAL_TRAIN = {"lr": 2e-3, "eps": 1e-4, "clip_grad_norm": 0.5, "aux_loss_weight": 1e-2}
"""Options under which layouts are compared. AdamW's usual epsilon would blow rounding up."""
UNCHOSEN = 3
"""The expert that no token chooses there."""
ALL_OF_RANK_1 = (4, 5, 6, 7)
"""Every expert that rank 1 owns at expert-parallel size 2."""


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


def masked(batch: Batch) -> Batch:
    """The batch with few targets in some sequences, so that ranks hold unequal numbers."""
    poor_B = torch.tensor([sample % 8 in (3, 5, 6, 7) for sample in batch.sample_ids])
    keep_BS = ~poor_B[:, None] | (torch.arange(batch.ids_BS.shape[1]) < 5)
    return replace(batch, loss_mask_BS=batch.loss_mask_BS & keep_BS)


def starve(model: HybridLM, experts: tuple[int, ...]) -> None:
    """Set the router biases so that no token chooses these experts."""
    for name, bias_E in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias_E[list(experts)] = -100.0
