"""What every objective has: counts first, then a loss whose parts have names.

A part of the loss is a sum over the whole global batch divided by a count over the whole global
batch. So a step first counts on every rank and in every micro-batch, sums the counts, and then runs
the micro-batches, whose shares of the loss add up to the global one.

Shapes: N counts that an objective needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.errors import UserError


class Normalizer(NamedTuple):
    """What shares are divided by in one optimizer step."""

    counts_N: Tensor  # int64: what Objective.count gave, over all ranks and micro-batches
    rows: int  # rows of the global batch
    step: int = 0  # optimizer steps done before this one


class LossParts(NamedTuple):
    """One micro-batch on one rank; sums, so that shares add up."""

    loss: Tensor  # fp32 scalar with gradient: this micro-batch's share of the global loss
    sums: dict[str, Tensor]  # part -> fp32 scalar, detached, not divided yet; the same parts always
    loads: dict[str, Tensor]  # layer name -> routed slots per expert


class Objective(nn.Module):
    """What the engine runs forward and backward. ``forward`` gives a share of the loss, and what
    ``means`` makes the numbers of a step from."""

    def count(self, batch: Batch, step: int) -> Tensor:
        """Denominators of a micro-batch, int64 [N]; ``step``: optimizer steps done before."""
        raise NotImplementedError

    def cut(self, batch: Batch, part: int, parts: int, step: int) -> Batch:
        """One of so many parts of the batch's rows, on the CPU; asked for with parallel.cp, which
        an objective without this cannot have."""
        raise NotImplementedError

    def check_divided(self) -> None:
        """Raise UserError where it cannot learn from parts of rows."""
        if type(self).cut is Objective.cut:
            raise UserError(
                f"{type(self).__name__} learns from whole rows alone: set parallel.cp to 1, or "
                "give it the method `cut` (docs/extending.md)"
            )

    def forward(self, batch: Batch, normalizer: Normalizer) -> LossParts:
        raise NotImplementedError

    def means(self, sums: Mapping[str, Tensor], normalizer: Normalizer) -> dict[str, float]:
        """From the parts' sums over the global batch to numbers by name. One is ``loss``: what the
        guard judges, and what is shown as the loss of the step. Here all parts are divided by the
        first count, and the first part is the loss."""
        count = normalizer.counts_N[0].clamp(min=1)
        means = {name: float(total / count) for name, total in sums.items()}
        return {"loss": next(iter(means.values())), **means}


def mtp_losses(figures: Mapping[str, float]) -> list[float]:
    """The entries ``mtp_1``, ``mtp_2`` ..., in this order."""
    depths = sum(name.startswith("mtp_") for name in figures)
    return [figures[f"mtp_{k}"] for k in range(1, depths + 1)]
