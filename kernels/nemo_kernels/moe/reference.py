"""Mixture-of-experts operations in plain PyTorch: the specification.

Shapes: T tokens, D hidden, E experts, K experts per token, R routed slots (T*K), L width in which
experts work, F expert inner width.

Everything is computed in fp32 (float64 for float64 inputs) and cast where it is stored. That is
also the faster way on CPUs without matrix units for bf16.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Slots(NamedTuple):
    """Routed slots sorted by expert. Slot s of token t is t*K + k."""

    order_R: Tensor
    """int64: the slot at each sorted place; its token is ``order_R // K``."""
    inverse_R: Tensor
    """int64: the sorted place of each slot."""
    counts_E: Tensor
    """int64: slots per expert."""


def wide(x: Tensor) -> Tensor:
    """x in the type in which arithmetic is done: float64 stays, anything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def topk_router(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    k: int,
    scaling_factor: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scores_TE = torch.mm(wide(x_TD), wide(weight_ED).t()).sigmoid()
    topk_ids_TK = (scores_TE.detach() + bias_E).topk(k, dim=-1, sorted=False).indices
    topk_weights_TK = scores_TE.gather(1, topk_ids_TK)
    if normalize:
        topk_weights_TK = topk_weights_TK / (topk_weights_TK.sum(-1, keepdim=True) + 1e-20)
    return topk_ids_TK, topk_weights_TK * scaling_factor, scores_TE


def sort_slots(topk_ids_TK: Tensor, n_experts: int) -> Slots:
    ids_R = topk_ids_TK.reshape(-1)
    device = ids_R.device
    sorted_R, order_R = ids_R.sort(stable=True)
    places_R = torch.arange(ids_R.numel(), device=device)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, places_R)
    # Boundaries by binary search rather than bincount, which waits for the GPU.
    bounds = torch.searchsorted(sorted_R, torch.arange(n_experts + 1, device=device))
    return Slots(order_R, inverse_R, bounds.diff())


class GroupedGemm(Protocol):
    """The three matrix products of grouped experts; rows of one expert are consecutive."""

    @staticmethod
    def groups(counts_E: Tensor) -> Any:
        """What the products need to know about the group sizes."""

    @staticmethod
    def operand(x: Tensor, like: Tensor) -> Tensor:
        """x in the type in which this implementation multiplies tensors given in like's type."""

    @staticmethod
    def rows_nt(x_RI: Tensor, w_EOI: Tensor, groups: Any) -> Tensor:
        """Row r of expert e: ``x_r @ w_e^T`` [R, O]."""

    @staticmethod
    def rows_nn(x_RO: Tensor, w_EOI: Tensor, groups: Any) -> Tensor:
        """Row r of expert e: ``x_r @ w_e`` [R, I]."""

    @staticmethod
    def outer(a_RO: Tensor, b_RI: Tensor, groups: Any) -> Tensor:
        """Expert e: the sum over its rows of ``a_r^T b_r`` [E, O, I]; zero without rows."""


class LoopGemm:
    """One matrix product per expert. On a GPU it waits for the group sizes."""

    @staticmethod
    def groups(counts_E: Tensor) -> list[int]:
        return counts_E.tolist()

    @staticmethod
    def operand(x: Tensor, like: Tensor) -> Tensor:
        return wide(x)

    @staticmethod
    def rows_nt(x_RI: Tensor, w_EOI: Tensor, groups: list[int]) -> Tensor:
        out_RO = x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])
        for x, w, out in zip(x_RI.split(groups), w_EOI, out_RO.split(groups), strict=True):
            torch.mm(x, w.t(), out=out)
        return out_RO

    @staticmethod
    def rows_nn(x_RO: Tensor, w_EOI: Tensor, groups: list[int]) -> Tensor:
        out_RI = x_RO.new_empty(x_RO.shape[0], w_EOI.shape[2])
        for x, w, out in zip(x_RO.split(groups), w_EOI, out_RI.split(groups), strict=True):
            torch.mm(x, w, out=out)
        return out_RI

    @staticmethod
    def outer(a_RO: Tensor, b_RI: Tensor, groups: list[int]) -> Tensor:
        out_EOI = a_RO.new_empty(len(groups), a_RO.shape[1], b_RI.shape[1])
        for a, b, out in zip(a_RO.split(groups), b_RI.split(groups), out_EOI, strict=True):
            torch.mm(a.t(), b, out=out)
        return out_EOI


def experts_forward(
    gemm: type[GroupedGemm],
    groups: Any,
    x_RL: Tensor,
    weights_R: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output y_RL and the pre-activation h_RF, which the backward pass needs."""

    def operand(x: Tensor) -> Tensor:
        return gemm.operand(x, x_RL)

    h_RF = gemm.rows_nt(operand(x_RL), operand(w_up_EFL), groups).to(x_RL.dtype)
    act_RF = wide(h_RF).relu()
    act_RF.mul_(act_RF).mul_(wide(weights_R)[:, None])
    return gemm.rows_nt(operand(act_RF), operand(w_down_ELF), groups), h_RF


def experts_backward(
    gemm: type[GroupedGemm],
    groups: Any,
    dy_RL: Tensor,
    x_RL: Tensor,
    h_RF: Tensor,
    weights_R: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_RL, weights_R, w_up_EFL and w_down_ELF."""

    def operand(x: Tensor) -> Tensor:
        return gemm.operand(x, x_RL)

    w_R1 = wide(weights_R)[:, None]
    relu_RF = wide(h_RF).relu()
    square_RF = relu_RF * relu_RF
    dact_RF = wide(gemm.rows_nn(operand(dy_RL), operand(w_down_ELF), groups))
    dweights_R = torch.linalg.vecdot(square_RF, dact_RF)
    dw_down_ELF = gemm.outer(operand(wide(dy_RL) * w_R1), operand(square_RF), groups)
    dh_RF = operand(dact_RF.mul_(relu_RF).mul_(2 * w_R1))
    dx_RL = gemm.rows_nn(dh_RF, operand(w_up_EFL), groups)
    dw_up_EFL = gemm.outer(dh_RF, operand(x_RL), groups)
    return dx_RL, dweights_R, dw_up_EFL, dw_down_ELF


def combine(y_RL: Tensor, inverse_R: Tensor, n_tokens: int) -> Tensor:
    """Sum over each token's K slots, in a fixed order, accumulated in fp32."""
    if not n_tokens:
        return y_RL.new_zeros(0, y_RL.shape[1])
    return F.embedding_bag(inverse_R.view(n_tokens, -1), y_RL, mode="sum")


class GroupedMLP(torch.autograd.Function):
    """``grouped_mlp``; keeps its inputs and the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any,
        gemm: type[GroupedGemm],
        x_RL: Tensor,
        weights_R: Tensor,
        counts_E: Tensor,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
    ) -> Tensor:
        groups = gemm.groups(counts_E)
        y_RL, h_RF = experts_forward(gemm, groups, x_RL, weights_R, w_up_EFL, w_down_ELF)
        ctx.save_for_backward(x_RL, h_RF, weights_R, w_up_EFL, w_down_ELF)
        ctx.gemm, ctx.groups = gemm, groups
        return y_RL.to(x_RL.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RL: Tensor) -> tuple[Tensor | None, ...]:
        x_RL, _, weights_R, w_up_EFL, w_down_ELF = ctx.saved_tensors
        dx_RL, dweights_R, dw_up_EFL, dw_down_ELF = experts_backward(
            ctx.gemm, ctx.groups, dy_RL.contiguous(), *ctx.saved_tensors
        )
        return (
            None,
            dx_RL.to(x_RL.dtype),
            dweights_R.to(weights_R.dtype),
            None,
            dw_up_EFL.to(w_up_EFL.dtype),
            dw_down_ELF.to(w_down_ELF.dtype),
        )


class MoeMLP(torch.autograd.Function):
    """``moe_mlp``; keeps its inputs (not their K-fold gather), the sort and the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any,
        gemm: type[GroupedGemm],
        x_TL: Tensor,
        slots: Slots,
        topk_weights_TK: Tensor,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
    ) -> Tensor:
        groups = gemm.groups(slots.counts_E)
        token_R = slots.order_R.div(topk_weights_TK.shape[1], rounding_mode="floor")
        weights_R = topk_weights_TK.reshape(-1).index_select(0, slots.order_R)
        y_RL, h_RF = experts_forward(
            gemm, groups, x_TL.index_select(0, token_R), weights_R, w_up_EFL, w_down_ELF
        )
        ctx.save_for_backward(x_TL, token_R, slots.inverse_R, h_RF, weights_R, w_up_EFL, w_down_ELF)
        ctx.gemm, ctx.groups = gemm, groups
        return combine(y_RL, slots.inverse_R, x_TL.shape[0]).to(x_TL.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TL: Tensor) -> tuple[Tensor | None, ...]:
        x_TL, token_R, inverse_R, h_RF, weights_R, w_up_EFL, w_down_ELF = ctx.saved_tensors
        dx_RL, dweights_R, dw_up_EFL, dw_down_ELF = experts_backward(
            ctx.gemm,
            ctx.groups,
            dy_TL.index_select(0, token_R),
            x_TL.index_select(0, token_R),
            h_RF,
            weights_R,
            w_up_EFL,
            w_down_ELF,
        )
        n_tokens = x_TL.shape[0]
        dweights_TK = dweights_R.index_select(0, inverse_R).view(n_tokens, -1)
        return (
            None,
            combine(dx_RL, inverse_R, n_tokens).to(x_TL.dtype),
            None,
            dweights_TK.to(weights_R.dtype),
            dw_up_EFL.to(w_up_EFL.dtype),
            dw_down_ELF.to(w_down_ELF.dtype),
        )
