"""Autograd of the expert operations, over any implementation of the expert MLP itself.

Shapes: T tokens, E experts, K experts per token, R routed slots (T*K), L width in which experts
work, F expert inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.backend import relative_deviation
from nemo_kernels.moe.routing import Slots, combine

Wanted = tuple[bool, bool]
"""Whether the gradients of w_up_EFL and of w_down_ELF are wanted; frozen weights have none."""
Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Experts(Protocol):
    """An implementation of the expert MLP on rows sorted by expert. It may leave results in fp32.

    ``groups`` is counts_E in whatever form the implementation needs.
    """

    def groups(self, counts_E: Tensor) -> Any: ...

    def forward(
        self, x_RL: Tensor, weights_R: Tensor, groups: Any, w_up_EFL: Tensor, w_down_ELF: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output y_RL and the pre-activation h_RF in x's dtype."""
        ...

    def pre_activation(self, x_RL: Tensor, groups: Any, w_up_EFL: Tensor) -> Tensor:
        """h_RF, to the bit that of forward."""
        ...

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
        ...


class GroupedMLP(torch.autograd.Function):
    """``grouped_mlp``; keeps its inputs and, without ``recompute``, the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any,
        experts: Experts,
        x_RL: Tensor,
        weights_R: Tensor,
        counts_E: Tensor,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
        recompute: bool,
    ) -> Tensor:
        ctx.experts, ctx.groups = experts, experts.groups(counts_E)
        ctx.weight_dtype = w_up_EFL.dtype
        w_up_EFL, w_down_ELF = w_up_EFL.to(x_RL.dtype), w_down_ELF.to(x_RL.dtype)
        y_RL, h_RF = experts.forward(x_RL, weights_R, ctx.groups, w_up_EFL, w_down_ELF)
        kept = None if recompute else h_RF
        ctx.save_for_backward(kept, x_RL, weights_R, w_up_EFL, w_down_ELF)
        return y_RL.to(x_RL.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RL: Tensor) -> tuple[Tensor | None, ...]:
        h_RF, x_RL, weights_R, w_up_EFL, w_down_ELF = ctx.saved_tensors
        if h_RF is None:
            h_RF = ctx.experts.pre_activation(x_RL, ctx.groups, w_up_EFL)
        dx_RL, dweights_R, dup_EFL, ddown_ELF = ctx.experts.backward(
            dy_RL.contiguous(),
            h_RF,
            x_RL,
            weights_R,
            ctx.groups,
            w_up_EFL,
            w_down_ELF,
            ctx.needs_input_grad[4:6],
        )
        return (
            None,
            dx_RL.to(x_RL.dtype),
            dweights_R.to(weights_R.dtype),
            None,
            None if dup_EFL is None else dup_EFL.to(ctx.weight_dtype),
            None if ddown_ELF is None else ddown_ELF.to(ctx.weight_dtype),
            None,
        )


class MoeMLP(torch.autograd.Function):
    """``moe_mlp``; keeps its inputs (not their K-fold gather), the sort and, without
    ``recompute``, the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any,
        experts: Experts,
        x_TL: Tensor,
        slots: Slots,
        topk_weights_TK: Tensor,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
        recompute: bool,
    ) -> Tensor:
        order_R, inverse_R, counts_E = slots
        ctx.experts, ctx.groups = experts, experts.groups(counts_E)
        ctx.weight_dtype = w_up_EFL.dtype
        w_up_EFL, w_down_ELF = w_up_EFL.to(x_TL.dtype), w_down_ELF.to(x_TL.dtype)
        ctx.k = topk_weights_TK.shape[1]
        token_R = order_R.div(ctx.k, rounding_mode="floor")
        weights_R = topk_weights_TK.reshape(-1).index_select(0, order_R)
        x_RL = x_TL.index_select(0, token_R)
        y_RL, h_RF = experts.forward(x_RL, weights_R, ctx.groups, w_up_EFL, w_down_ELF)
        kept = None if recompute else h_RF
        ctx.save_for_backward(kept, x_TL, token_R, inverse_R, weights_R, w_up_EFL, w_down_ELF)
        return combine(y_RL, inverse_R, x_TL.shape[0]).to(x_TL.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TL: Tensor) -> tuple[Tensor | None, ...]:
        h_RF, x_TL, token_R, inverse_R, weights_R, w_up_EFL, w_down_ELF = ctx.saved_tensors
        n_tokens = x_TL.shape[0]
        dy_RL, x_RL = dy_TL.index_select(0, token_R), x_TL.index_select(0, token_R)
        if h_RF is None:
            h_RF = ctx.experts.pre_activation(x_RL, ctx.groups, w_up_EFL)
        dx_RL, dweights_R, dup_EFL, ddown_ELF = ctx.experts.backward(
            dy_RL,
            h_RF,
            x_RL,
            weights_R,
            ctx.groups,
            w_up_EFL,
            w_down_ELF,
            ctx.needs_input_grad[4:6],
        )
        dweights_TK = dweights_R.index_select(0, inverse_R).view(n_tokens, ctx.k)
        return (
            None,
            combine(dx_RL, inverse_R, n_tokens).to(x_TL.dtype),
            None,
            dweights_TK.to(weights_R.dtype),
            None if dup_EFL is None else dup_EFL.to(ctx.weight_dtype),
            None if ddown_ELF is None else ddown_ELF.to(ctx.weight_dtype),
            None,
        )


def self_check(
    moe_mlp: Callable[..., Tensor], reference: Callable[..., Tensor], device_type: str
) -> float:
    """Largest deviation of an implementation of ``moe_mlp`` from the reference's, relative to its
    largest value, of output and gradients in bf16, with an expert that gets no token."""
    generator = torch.Generator().manual_seed(0)
    n_experts, n_tokens, width, inner = 5, 96, 64, 128
    shapes = (
        (n_tokens, width),
        (n_tokens, 2),
        (n_experts, inner, width),
        (n_experts, width, inner),
    )
    inputs = [
        torch.randn(shape, generator=generator).to(device_type, torch.bfloat16) for shape in shapes
    ]
    pairs = torch.tensor([[0, 1], [1, 3], [4, 3]], device=device_type)
    ids_TK = pairs.repeat(n_tokens // len(pairs), 1)
    return relative_deviation(
        lambda mlp, x_TL, weights_TK, up_EFL, down_ELF: mlp(
            x_TL, ids_TK, weights_TK, up_EFL, down_ELF
        ),
        (moe_mlp, reference),
        tuple(inputs),
    )
