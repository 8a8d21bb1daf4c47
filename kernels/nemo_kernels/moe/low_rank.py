"""Experts whose matrices have low-rank parts beside them (LoRA): no sum of matrices is ever made.

``(W + scale B A) x`` is computed as ``W x + scale B (A x)``, by any implementation's products of
rows and experts. The backward pass keeps the tokens and the pre-activation, and computes gradients
of the low-rank parts from products of their width; none of a frozen W.

Shapes: as in ``function``; r rank, I and O columns that go into a matrix and come out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.moe.function import Experts, Routed, Slots


class LowRank(NamedTuple):
    """Of a stack of matrices [E, O, I]."""

    A_ErI: Tensor
    B_EOr: Tensor
    scale: float


class _Side(NamedTuple):
    """Matrices and what stands beside them; both perhaps in fp32, where rows are not."""

    experts: Experts
    groups: Any
    W_EOI: Tensor
    A_ErI: Tensor | None
    B_EOr: Tensor | None
    scale: float

    def rows(self, a_RM: Tensor, b_EMN: Tensor) -> Tensor:
        return self.experts.rows(a_RM, b_EMN.to(a_RM.dtype), self.groups)

    def sums(self, a_RM: Tensor, b_RN: Tensor, like: Tensor) -> Tensor:
        return self.experts.sums(a_RM, b_RN, self.groups, like.dtype)

    def forward(self, x_RI: Tensor) -> Tensor:
        y_RO = self.rows(x_RI, self.W_EOI.mT)
        if self.A_ErI is not None and self.B_EOr is not None:
            low_RO = self.rows(self.rows(x_RI, self.A_ErI.mT), self.B_EOr.mT)
            y_RO.add_(low_RO, alpha=self.scale)
        return y_RO

    def backward(
        self, x_RI: Tensor, dy_RO: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of rows, W (if wanted), A and B."""
        dx_RI = self.rows(dy_RO, self.W_EOI)
        dW_EOI = self.sums(dy_RO, x_RI, self.W_EOI) if wanted else None
        if self.A_ErI is None or self.B_EOr is None:
            return dx_RI, dW_EOI, None, None
        low_Rr = self.rows(x_RI, self.A_ErI.mT).mul_(self.scale)
        dlow_Rr = self.rows(dy_RO, self.B_EOr).mul_(self.scale)
        dA_ErI = self.sums(dlow_Rr, x_RI, self.A_ErI)
        dB_EOr = self.sums(dy_RO, low_Rr, self.B_EOr)
        return dx_RI.add_(self.rows(dlow_Rr, self.A_ErI)), dW_EOI, dA_ErI, dB_EOr


def mlp(
    experts: Experts,
    x_TL: Tensor,
    weights: Tensor,
    slots: Slots | None,
    counts_E: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool,
    low_rank: tuple[LowRank | None, LowRank | None],
) -> Tensor:
    """``nemo_kernels.moe.moe_mlp``, or without ``slots`` ``grouped_mlp``, with low-rank parts."""
    none = (None, None, 0.0)
    (A_up, B_up, up_scale), (A_down, B_down, down_scale) = (low or none for low in low_rank)
    matrices = (w_up_EFL, w_down_ELF, A_up, B_up, A_down, B_down)
    y_TL: Tensor = _AdaptedMLP.apply(
        experts, (up_scale, down_scale), slots, counts_E, not recompute, x_TL, weights, *matrices
    )
    return y_TL


class _AdaptedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        experts: Experts,
        scales: tuple[float, float],
        slots: Slots | None,
        counts_E: Tensor,
        keep: bool,
        x_TL: Tensor,
        weights: Tensor,
        *matrices: Tensor | None,
    ) -> Tensor:
        token_R = inverse_TK = None
        weight_R = weights
        if slots is not None:
            token_R = slots.order_R.div(weights.shape[1], rounding_mode="floor").int()
            inverse_TK = slots.inverse_R.view(weights.shape)
            weight_R = weights.reshape(-1).index_select(0, slots.order_R)
        ctx.experts, ctx.scales = experts, scales
        ctx.groups = experts.groups(counts_E, weights.numel())
        up, down = _sides(ctx, matrices)
        x_RL = x_TL if token_R is None else x_TL.index_select(0, token_R)
        h_RF = up.forward(x_RL)
        y_RL = down.forward(_activated(h_RF, weight_R)[0])
        ctx.save_for_backward(
            x_TL, token_R, weight_R, inverse_TK, h_RF if keep else None, *matrices
        )
        return y_RL if inverse_TK is None else experts.combine(y_RL, inverse_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TL: Tensor) -> tuple[Tensor | None, ...]:
        x_TL, token_R, weight_R, inverse_TK, h_RF, *matrices = ctx.saved_tensors
        up, down = _sides(ctx, matrices)
        routed = Routed(x_TL, token_R, weight_R, ctx.groups, up.W_EOI, down.W_EOI)
        x_RL = routed.rows(x_TL)
        h_RF = up.forward(x_RL) if h_RF is None else h_RF
        act_RF, relu_RF = _activated(h_RF, weight_R)
        want_up, want_down = ctx.needs_input_grad[7:9]
        dact_RF, ddown, dA_down, dB_down = down.backward(
            act_RF, routed.rows(dy_TL.contiguous()), want_down
        )
        del act_RF
        dact_RF = dact_RF.to(relu_RF.dtype).mul_(relu_RF)
        dweights = torch.linalg.vecdot(dact_RF, relu_RF).to(weight_R.dtype)
        dh_RF = dact_RF.mul_(2 * weight_R[:, None]).to(h_RF.dtype)
        dx, dup, dA_up, dB_up = up.backward(x_RL, dh_RF, want_up)
        if inverse_TK is not None:
            dx = ctx.experts.combine(dx, inverse_TK)
            dweights = dweights.index_select(0, inverse_TK.flatten()).view(inverse_TK.shape)
        of_matrices = (dup, ddown, dA_up, dB_up, dA_down, dB_down)
        return None, None, None, None, None, dx, dweights, *of_matrices


def _sides(ctx: Any, matrices: Any) -> tuple[_Side, _Side]:
    w_up, w_down, A_up, B_up, A_down, B_down = matrices
    to, (up_scale, down_scale) = (ctx.experts, ctx.groups), ctx.scales
    return _Side(*to, w_up, A_up, B_up, up_scale), _Side(*to, w_down, A_down, B_down, down_scale)


def _activated(h_RF: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """weight * relu(h)^2 in h's dtype, and relu(h) in fp32 (of fp64 in fp64)."""
    relu_RF = h_RF.to(torch.promote_types(h_RF.dtype, torch.float32)).relu()
    return relu_RF.square().mul_(weight_R[:, None]).to(h_RF.dtype), relu_RF
