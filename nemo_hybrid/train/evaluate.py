"""Losses on held-out data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets
from nemo_hybrid.parallel.world import World


@torch.no_grad()
def heldout_losses(
    objective: NextToken, batches: Iterable[Batch], world: World
) -> dict[str, float]:
    """Mean cross-entropy in nats per target: ``loss`` and ``mtp_1`` ... over this process's
    ``batches`` and those of all others, which are equally many. Every target counts alike."""
    names = objective.names
    sums_N = torch.zeros(len(names), dtype=torch.float64, device=world.device)
    targets_N = torch.zeros(len(names), dtype=torch.int64, device=world.device)
    unit = Normalizer(torch.ones_like(targets_N), rows=1)
    for batch in batches:
        batch = batch.to(world.device)
        sums = objective(batch, unit).sums
        sums_N += torch.stack([sums[name] for name in names])
        targets_N += count_targets(batch, objective.depths)
    mean_N: Tensor = world.sum(sums_N) / world.sum(targets_N).clamp(min=1)
    return dict(zip(["loss", *names[1:]], mean_N.tolist(), strict=True))
