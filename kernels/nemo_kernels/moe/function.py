"""Autograd of the expert operations, over any implementation of the expert MLP itself.

Shapes: T tokens, E experts, K experts per token, R routed slots (T*K), L width in which experts
work, F expert inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.backend import draw, relative_deviation

Wanted = tuple[bool, bool]
"""Whether the gradients of w_up_EFL and of w_down_ELF are wanted; frozen weights have none."""
Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Slots(NamedTuple):
    """Routed slots sorted by expert. Slot ``t*K + k`` is the k-th choice of token t."""

    order_R: Tensor
    """int64: the slot at each sorted place; its token is ``order_R // K``."""
    inverse_R: Tensor
    """int64: the sorted place of each slot."""
    counts_E: Tensor
    """int64: slots per expert."""


class Experts(Protocol):
    """An implementation of the expert MLP on rows sorted by expert. It may leave results in fp32.

    ``groups`` is counts_E in whatever form the implementation needs.
    """

    def groups(self, counts_E: Tensor) -> Any: ...

    def forward(
        self, x_RL: Tensor, weights_R: Tensor, groups: Any, w_up_EFL: Tensor, w_down_ELF: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output y_RL and the pre-activation h_RF in x's dtype."""

    def pre_activation(self, x_RL: Tensor, groups: Any, w_up_EFL: Tensor) -> Tensor:
        """h_RF, to the bit that of forward."""

    def backward(
        self,
        dy_RL: Tensor,
        h_RF: Tensor,
        x_RL: Tensor,
        weights_R: Tensor,
        groups: Any,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        """Gradients of x_RL, weights_R, w_up_EFL, w_down_ELF; zero for experts without rows."""


class ExpertMLP(torch.autograd.Function):
    """Both entry points. ``slots`` None: x is sorted already, and results are not combined.

    Keeps its inputs (not their K-fold gather), the sort and, without ``recompute``, the
    pre-activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        experts: Experts,
        x_TL: Tensor,
        weights: Tensor,
        slots: Slots | None,
        counts_E: Tensor,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
        recompute: bool,
    ) -> Tensor:
        ctx.experts, ctx.groups, ctx.shape = experts, experts.groups(counts_E), weights.shape
        ctx.weight_dtype = w_up_EFL.dtype
        w_up_EFL, w_down_ELF = w_up_EFL.to(x_TL.dtype), w_down_ELF.to(x_TL.dtype)
        token_R = inverse_R = None
        if slots is not None:
            token_R = slots.order_R.div(weights.shape[1], rounding_mode="floor")
            inverse_R = slots.inverse_R
            weights = weights.reshape(-1).index_select(0, slots.order_R)
        x_RL = _gathered(x_TL, token_R)
        y_RL, h_RF = experts.forward(x_RL, weights, ctx.groups, w_up_EFL, w_down_ELF)
        kept = None if recompute else h_RF
        ctx.save_for_backward(kept, x_TL, token_R, inverse_R, weights, w_up_EFL, w_down_ELF)
        return combine(y_RL, inverse_R, len(x_TL)).to(x_TL.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TL: Tensor) -> tuple[Tensor | None, ...]:
        h_RF, x_TL, token_R, inverse_R, weights_R, w_up_EFL, w_down_ELF = ctx.saved_tensors
        dy_RL, x_RL = _gathered(dy_TL, token_R).contiguous(), _gathered(x_TL, token_R)
        if h_RF is None:
            h_RF = ctx.experts.pre_activation(x_RL, ctx.groups, w_up_EFL)
        wanted = ctx.needs_input_grad[5:7]
        dx_RL, dweights, dup_EFL, ddown_ELF = ctx.experts.backward(
            dy_RL, h_RF, x_RL, weights_R, ctx.groups, w_up_EFL, w_down_ELF, wanted
        )
        return (
            None,
            combine(dx_RL, inverse_R, len(x_TL)).to(x_TL.dtype),
            _gathered(dweights, inverse_R).view(ctx.shape).to(weights_R.dtype),
            None,
            None,
            None if dup_EFL is None else dup_EFL.to(ctx.weight_dtype),
            None if ddown_ELF is None else ddown_ELF.to(ctx.weight_dtype),
            None,
        )


def _gathered(t: Tensor, places: Tensor | None) -> Tensor:
    return t if places is None else t.index_select(0, places)


def combine(y_RL: Tensor, inverse_R: Tensor | None, n_tokens: int) -> Tensor:
    """Sum of each token's K slots, in a fixed order, accumulated in fp32: [T, L]. Without
    ``inverse_R``: the rows."""
    if inverse_R is None:
        return y_RL
    if not n_tokens:
        return y_RL.new_zeros(0, y_RL.shape[1])
    return F.embedding_bag(inverse_R.view(n_tokens, -1), y_RL, mode="sum")


def grouped_mlp(
    experts: Experts,
    x_RL: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool = False,
) -> Tensor:
    """``nemo_kernels.moe.grouped_mlp`` by an implementation of the experts."""
    return ExpertMLP.apply(
        experts, x_RL, weights_R, None, counts_E, w_up_EFL, w_down_ELF, recompute
    )


def moe_mlp(
    experts: Experts,
    x_TL: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool = False,
    *,
    sort: Callable[[Tensor, int], Slots],
) -> Tensor:
    """``nemo_kernels.moe.moe_mlp`` by an implementation of the experts."""
    slots = sort(topk_ids_TK, w_up_EFL.shape[0])
    return ExpertMLP.apply(
        experts, x_TL, topk_weights_TK, slots, slots.counts_E, w_up_EFL, w_down_ELF, recompute
    )


def self_check(
    moe_mlp: Callable[..., Tensor], reference: Callable[..., Tensor], device_type: str
) -> float:
    """Largest deviation of an implementation of ``moe_mlp`` from the reference's, relative to its
    largest value, of output and gradients in bf16, with an expert that gets no token."""
    inputs = draw(device_type, (96, 64), (96, 2), (5, 128, 64), (5, 64, 128))
    ids_TK = torch.tensor([[0, 1], [1, 3], [4, 3]], device=device_type).repeat(32, 1)
    return relative_deviation(
        lambda mlp, x_TL, weights_TK, up_EFL, down_ELF: mlp(
            x_TL, ids_TK, weights_TK, up_EFL, down_ELF
        ),
        (moe_mlp, reference),
        inputs,
    )
