"""Losses on held-out data."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_hybrid.data.loader import Data, heldout_batches
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.losses import Normalizer, PretrainObjective, count_targets


@torch.no_grad()
def evaluate(
    objective: PretrainObjective,
    data: Data,
    world: World,
    *,
    sequences: int,
    sequence_length: int,
    micro_batch_size: int,
) -> list[float]:
    """Mean cross-entropy in nats per target, [main, depth 1, ...], over the same held-out windows
    on every call and at every number of processes. Raises UserError without held-out data."""
    losses = 1 + objective.depths
    sums_N = torch.zeros(losses, dtype=torch.float64, device=world.device)
    targets_N = torch.zeros(losses, dtype=torch.int64, device=world.device)
    unit = Normalizer(torch.ones(losses, dtype=torch.int64, device=world.device), 1)
    for batch in heldout_batches(
        data,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        limit=sequences,
    ):
        batch = batch.to(world.device)
        sums_N += objective(batch, unit).ce_sums_N
        targets_N += count_targets(batch, objective.depths)
    mean_N: Tensor = world.sum(sums_N) / world.sum(targets_N).clamp(min=1)
    return mean_N.tolist()
