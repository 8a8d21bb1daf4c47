"""Losses on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.mamba2 import Mamba2
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets
from nemo_hybrid.parallel.world import World


@contextmanager
def small_steps(model: HybridLM, world: World) -> Iterator[Callable[[], dict[str, float]]]:
    """While it is open, count Mamba-2 time steps below ``time_step_min``, which transformers would
    raise to it. Yields the share of all processes, as ``small_time_steps``; nothing for a model
    without such layers. All processes call that together."""
    small_total = torch.zeros(2, dtype=torch.float64, device=world.device)
    limit = model.config.time_step_min
    layers = [module for module in model.modules() if isinstance(module, Mamba2)]

    def see(layer: Mamba2, projected: Tensor) -> None:
        dt = F.softplus(projected[..., -layer.heads :].float() + layer.dt_bias)
        small_total.add_(torch.stack([(dt < limit).sum(), torch.tensor(dt.numel()).to(dt.device)]))

    def share() -> dict[str, float]:
        small, total = world.sum(small_total).tolist()
        return {"small_time_steps": small / total} if total else {}

    hooks = [
        layer.in_proj.register_forward_hook(lambda _, __, out, layer=layer: see(layer, out))
        for layer in layers
    ]
    try:
        yield share
    finally:
        for hook in hooks:
            hook.remove()


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
