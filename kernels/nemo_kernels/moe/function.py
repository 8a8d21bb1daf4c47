"""Autograd of the expert operations, over any implementation of the expert MLP itself.

Shapes: T tokens, E experts, K experts per token, R routed slots (T*K), L width in which experts
work, F expert inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.backend import Sizes, draw, relative_deviation

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


Sort = Callable[[Tensor, int], Slots]


class Routed(NamedTuple):
    """What experts work on: slots sorted by expert, and the tokens that they belong to."""

    x_TL: Tensor
    token_R: Tensor | None
    """int32: each slot's token; None: tokens are the sorted slots, T = R."""
    weight_R: Tensor
    groups: Any
    """Slots per expert, as `Experts.groups` makes them."""
    w_up_EFL: Tensor
    w_down_ELF: Tensor
    """Both perhaps in fp32, where x is not."""

    def rows(self, t_TL: Tensor) -> Tensor:
        """Of each slot's token: [R, L]."""
        return t_TL if self.token_R is None else t_TL.index_select(0, self.token_R)

    @property
    def up_EFL(self) -> Tensor:
        """In x's dtype, as `down_ELF`."""
        return self.w_up_EFL.to(self.x_TL.dtype)

    @property
    def down_ELF(self) -> Tensor:
        return self.w_down_ELF.to(self.x_TL.dtype)


class Experts:
    """An implementation of the expert MLP. It may leave results in another dtype than x's."""

    def groups(self, counts_E: Tensor, n_rows: int) -> Any:
        """``counts_E``, whose sum is n_rows, in the form that the implementation needs."""
        raise NotImplementedError

    def forward(self, routed: Routed, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Output y_RL, and if it is to be kept the pre-activation h_RF in x's dtype."""
        raise NotImplementedError

    def pre_activation(self, routed: Routed) -> Tensor:
        """h_RF, to the bit that of forward."""
        raise NotImplementedError

    def backward(self, routed: Routed, h_RF: Tensor, dy_TL: Tensor, wanted: Wanted) -> Gradients:
        """Gradients of x for each slot [R, L], weight_R, w_up_EFL and w_down_ELF; zero for experts
        without slots. ``dy_TL``, contiguous, has rows as x has."""
        raise NotImplementedError

    def rows(self, a_RM: Tensor, b_EMN: Tensor, groups: Any) -> Tensor:
        """Each row times its expert's matrix, in a's dtype, which is b's: [R, N]."""
        raise NotImplementedError

    def sums(self, a_RM: Tensor, b_RN: Tensor, groups: Any, dtype: torch.dtype) -> Tensor:
        """a^T b of each expert's rows, zero for one without: [E, M, N]."""
        raise NotImplementedError

    def combine(self, y_RL: Tensor, inverse_TK: Tensor) -> Tensor:
        """Sum of each token's K slots, in a fixed order, accumulated in fp32: [T, L]."""
        if not len(inverse_TK):
            return y_RL.new_zeros(0, y_RL.shape[1])
        return F.embedding_bag(inverse_TK, y_RL, mode="sum")


def _computed(
    experts: Experts,
    x_TL: Tensor,
    weights: Tensor,
    slots: Slots | None,
    counts_E: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    keep: bool,
) -> tuple[Tensor, Routed, Tensor | None, Tensor | None]:
    """The output; and what it was made of, the places of each token's slots, and what was kept."""
    token_R = inverse_TK = None
    weight_R = weights
    if slots is not None:
        token_R = slots.order_R.div(weights.shape[1], rounding_mode="floor").int()
        inverse_TK = slots.inverse_R.view(weights.shape)
        weight_R = weights.reshape(-1).index_select(0, slots.order_R)
    groups = experts.groups(counts_E, weights.numel())
    routed = Routed(x_TL, token_R, weight_R, groups, w_up_EFL, w_down_ELF)
    y_RL, h_RF = experts.forward(routed, keep)
    return _combined(experts, y_RL, inverse_TK).to(x_TL.dtype), routed, inverse_TK, h_RF


class _ExpertMLP(torch.autograd.Function):
    """Keeps its inputs (not their K-fold gather), the sort and, if asked, the pre-activation."""

    @staticmethod
    def forward(ctx: Any, experts: Experts, x_TL: Tensor, *inputs: Any) -> Tensor:
        output_TL, routed, inverse_TK, h_RF = _computed(experts, x_TL, *inputs)
        ctx.experts, ctx.groups = experts, routed.groups
        kept = h_RF if inputs[-1] else None
        _, token_R, weight_R, _, w_up_EFL, w_down_ELF = routed
        ctx.save_for_backward(x_TL, token_R, weight_R, w_up_EFL, w_down_ELF, inverse_TK, kept)
        return output_TL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TL: Tensor) -> tuple[Tensor | None, ...]:
        experts: Experts = ctx.experts
        x_TL, token_R, weight_R, w_up_EFL, w_down_ELF, inverse_TK, h_RF = ctx.saved_tensors
        routed = Routed(x_TL, token_R, weight_R, ctx.groups, w_up_EFL, w_down_ELF)
        if h_RF is None:
            h_RF = experts.pre_activation(routed)
        wanted = ctx.needs_input_grad[5:7]
        dx_RL, dweights, *dmatrices = experts.backward(routed, h_RF, dy_TL.contiguous(), wanted)
        dx_TL = _combined(experts, dx_RL, inverse_TK).to(routed.x_TL.dtype)
        if inverse_TK is not None:
            dweights = dweights.index_select(0, inverse_TK.flatten()).view(inverse_TK.shape)
        dup_EFL, ddown_ELF = (None if d is None else d.to(w_up_EFL.dtype) for d in dmatrices)
        dweights = dweights.to(routed.weight_R.dtype)
        return None, dx_TL, dweights, None, None, dup_EFL, ddown_ELF, None


def _combined(experts: Experts, y_RL: Tensor, inverse_TK: Tensor | None) -> Tensor:
    return y_RL if inverse_TK is None else experts.combine(y_RL, inverse_TK)


def mlp(
    experts: Experts,
    x: Tensor,
    weights: Tensor,
    slots: Slots | None,
    counts_E: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool = False,
) -> Tensor:
    """``nemo_kernels.moe.moe_mlp`` by an implementation of the experts, or without ``slots``
    ``grouped_mlp``."""
    tensors = tuple(t.contiguous() for t in (x, weights, w_up_EFL, w_down_ELF))
    x, weights, w_up_EFL, w_down_ELF = tensors
    given = (experts, x, weights, slots, counts_E, w_up_EFL, w_down_ELF)
    if not torch.is_grad_enabled():  # without what autograd takes for itself
        return _computed(*given, False)[0]
    return _ExpertMLP.apply(*given, not recompute and any(t.requires_grad for t in tensors))


def self_check(
    by: tuple[Experts, Sort], reference: tuple[Experts, Sort], device_type: str, sizes: Sizes
) -> float:
    """Largest deviation of experts from those of the reference, relative to its largest value, of
    output and gradients in bf16, with an expert that gets no token."""
    repeats, inner, width = sizes.tokens // 3, sizes.expert_inner, sizes.expert_width
    tokens, matrices = 3 * repeats, ((5, inner, width), (5, width, inner))
    inputs = draw(device_type, (tokens, width), (tokens, 2), *matrices)
    ids_TK = torch.tensor([[0, 1], [1, 3], [4, 3]], device=device_type).repeat(repeats, 1)

    def run(
        by: tuple[Experts, Sort], x_TL: Tensor, weights_TK: Tensor, up_EFL: Tensor, down_ELF: Tensor
    ) -> Tensor:
        experts, sort = by
        slots = sort(ids_TK, 5)
        return mlp(experts, x_TL, weights_TK, slots, slots.counts_E, up_EFL, down_ELF)

    return relative_deviation(run, (by, reference), inputs)
