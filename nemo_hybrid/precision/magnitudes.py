"""How large activations get: the inputs of products are watched while a model runs.

Shapes: K in-features; R routed slots sorted by expert, E experts, L width in which experts work, F
expert inner width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import adaptable
from nemo_hybrid.precision.groups import is_stacked
from nemo_kernels.moe.function import Routed
from nemo_kernels.moe.reference import LoopExperts

Call = Callable[..., Tensor | None]
_BIN_BITS = 16
"""Of an fp32 number that its bin leaves out: a bin lies between two neighbours in bf16."""


@contextmanager
def watching(
    model: HybridLM, places: Collection[str], percentile: float | None = None
) -> Iterator[dict[str, Magnitudes]]:
    """Inside, what the products of ``places`` take is seen. Of stacked experts only this process's
    own are there."""
    stacks = adaptable(model)[1]
    seen = {p: Magnitudes(len(stacks[p]) if p in stacks else 1, percentile) for p in places}
    with called_with_inputs(model, {p: m.see for p, m in seen.items()}, _Watched):
        yield seen


@contextmanager
def called_with_inputs(
    model: HybridLM, calls: Mapping[str, Call], experts_of: Callable[[Any, Any], LoopExperts]
) -> Iterator[None]:
    """Inside, a linear layer's call gets its inputs, which what it gives replaces, unless that is
    None; and experts compute as what ``experts_of`` makes of the calls for up and down projection
    (None: there is none)."""
    with ExitStack() as stack:
        for place, call in calls.items():
            if not is_stacked(place):
                hook = model.get_submodule(place).register_forward_pre_hook(
                    lambda module, args, call=call: call(args[0])
                )
                stack.callback(hook.remove)
        for name in sorted({p.rpartition(".")[0] for p in calls if is_stacked(p)}):
            experts: Any = model.get_submodule(name)
            stack.callback(setattr, experts, "low_precision", experts.low_precision)
            up, down = calls.get(f"{name}.up_proj"), calls.get(f"{name}.down_proj")
            experts.low_precision = experts_of(up, down)
        yield


class _Watched(LoopExperts):
    """The expert MLP, whose inputs are seen."""

    def __init__(self, up: Call | None, down: Call | None) -> None:
        self.up, self.down = up, down

    def forward(self, routed: Routed, keep: bool) -> tuple[Tensor, Tensor]:
        y_RL, h_RF = super().forward(routed, True)  # the pre-activation is seen
        if self.up is not None:
            self.up(routed.rows(routed.x_TL), routed.groups)
        if self.down is not None:
            self.down(h_RF.relu().square(), routed.groups)
        return y_RL, h_RF


class Magnitudes:
    """The largest magnitude of each expert's inputs (of one: no experts), and with ``percentile``
    a histogram of all that are not zero, whose bins hold one bf16 number each."""

    def __init__(self, experts: int, percentile: float | None) -> None:
        self.amax_E = torch.zeros(experts)
        self.rows_E = torch.zeros(experts, dtype=torch.int64)
        self.percentile = percentile
        self.bins = torch.zeros(1 << (31 - _BIN_BITS), dtype=torch.int64)

    def see(self, x: Tensor, groups: list[int] | None = None) -> None:
        """x [.., K]; with groups, rows by expert."""
        x = x.flatten(0, -2).abs()
        counts = [len(x)] if groups is None else groups
        for expert, rows in enumerate(x.split(counts)):
            if len(rows):
                # A NaN stays: max passes it on.
                self.amax_E[expert] = self.amax_E[expert].maximum(rows.amax().float().cpu())
                self.rows_E[expert] += len(rows)
        if self.percentile is not None:
            # Not of zeros, of which relu leaves many: they have no scale to be covered by.
            bins = x[x > 0].float().view(torch.int32) >> _BIN_BITS
            self.bins += torch.bincount(bins, minlength=len(self.bins)).cpu()

    def unseen(self) -> list[int]:
        return [expert for expert, rows in enumerate(self.rows_E.tolist()) if not rows]

    def result(self, place: str) -> Tensor:
        """[E], see `Calibration.amax`. Raises UserError naming the place."""
        if not self.amax_E.isfinite().all():
            raise UserError(
                f"the inputs or outputs of {place} are not finite: the checkpoint is broken"
            )
        amax_E = self.amax_E.clone()
        if self.percentile is not None:
            needed = math.ceil(int(self.bins.sum()) * self.percentile / 100)
            last = int(torch.searchsorted(self.bins.cumsum(0), needed))
            end = torch.tensor((last + 1) << _BIN_BITS, dtype=torch.int32).view(torch.float32)
            amax_E = amax_E.minimum(end)
        amax_E[self.unseen()] = amax_E.max()
        return torch.where(amax_E == 0, 1.0, amax_E)
