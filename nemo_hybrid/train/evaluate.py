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
from nemo_hybrid.objectives.next_token import NextToken, count_targets
from nemo_hybrid.parallel.world import World

_BANDS = 40
"""Of positions; each ends at a power of two, and no row has 2**40 tokens."""


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
        small_total[0] += (dt < limit).sum()
        small_total[1] += dt.numel()

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
    objective: NextToken, batches: Iterable[Batch], world: World, positions: bool = False
) -> dict[str, float]:
    """Mean cross-entropy in nats per target: ``loss`` and ``mtp_1`` ... over this process's
    ``batches`` and those of all others, which are equally many. Every target counts alike. Rows
    are whole here; processes that divide them are given the same.

    With ``positions`` also ``loss_at_1``, ``loss_at_2``, ``loss_at_4`` ...: of the next tokens that
    were predicted from so many tokens of their document, or fewer, down to the band before.
    """
    names = objective.names
    sums_N = torch.zeros(len(names), dtype=torch.float64, device=world.device)
    targets_N = torch.zeros(len(names), dtype=torch.int64, device=world.device)
    ends_P = 2 ** torch.arange(_BANDS, device=world.device)
    bands_2P = torch.zeros(2, _BANDS, dtype=torch.float64, device=world.device)  # sums, targets
    for batch in batches:
        if not world.part:
            targets_N += count_targets(batch.to(world.device), objective.depths)
        if world.cp > 1:
            batch = objective.cut(batch, world.part, world.cp, 0)
        batch = batch.to(world.device)
        ce_NT, weights_NT = objective.per_target(batch)
        sums_N += (ce_NT * weights_NT).sum(1)
        band_T = torch.bucketize(batch.positions_BS.flatten().long() + 1, ends_P)
        both_2T = torch.stack([ce_NT[0] * weights_NT[0], weights_NT[0]]).double()
        bands_2P.index_add_(1, band_T, both_2T)
    mean_N: Tensor = world.sum(sums_N) / world.sum(targets_N).clamp(min=1)
    losses = dict(zip(["loss", *names[1:]], mean_N.tolist(), strict=True))
    if positions:
        for band, (total, count) in enumerate(world.sum(bands_2P).T.tolist()):
            losses |= {f"loss_at_{2**band}": total / count} if count else {}
    return losses
