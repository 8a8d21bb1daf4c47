"""A linear layer, and the routed experts' MLP with its six grouped products, in low precision.

Master weights and the optimizer are not touched by it: weights are quantized as they are given, in
every pass, and what is kept for the backward pass is what came. Gradients of weights are summed in
fp32 and rounded once to the weight's dtype.

Shapes: T tokens, K in-features, N out-features; R routed slots sorted by expert, P the same padded,
E experts, L width in which experts work, F expert inner width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_hybrid.precision.operands import BLOCKS, Products
from nemo_kernels import lowp
from nemo_kernels.moe.function import Experts, Gradients, Routed, Wanted


class QuantizedLinear(Products):
    """``(x [.., K], weight [N, K]) -> x W^T [.., N]``."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        y_TN: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, self)
        return y_TN.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight: Tensor, products: QuantizedLinear) -> Tensor:
        ctx.products, ctx.weight_dtype = products, weight.dtype
        weight_NK = weight.to(x_TK.dtype)
        ctx.save_for_backward(x_TK, weight_NK)
        a, b = products.forward_input(x_TK), products.forward_weight(weight_NK)
        return lowp.product(a, b, x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        products: QuantizedLinear = ctx.products
        x_TK, weight_NK = ctx.saved_tensors
        use = products.streams.next_use(products.name)
        wgrad = ctx.needs_input_grad[1]  # frozen weights need none
        for_dgrad, for_wgrad = products.gradient(dy_TN.contiguous(), use, wgrad=wgrad)
        dx_TK = lowp.product(for_dgrad, products.dgrad_weight(weight_NK), x_TK.dtype)
        if not wgrad:
            return dx_TK, None, None
        dweight_NK = lowp.product(for_wgrad, products.wgrad_input(x_TK), torch.float32)
        return dx_TK, dweight_NK.to(ctx.weight_dtype), None


class Segments(NamedTuple):
    """Experts' rows with room for zeros behind each one's: no block holds rows of two."""

    place_R: Tensor  # int64: where each row goes
    ends_E: Tensor  # int32: the row after each expert's last one, zeros included
    rows: int  # P

    def pad(self, t_R: Tensor) -> Tensor:
        padded_P = t_R.new_zeros(self.rows, *t_R.shape[1:])
        return padded_P.index_copy_(0, self.place_R, t_R)


class QuantizedExperts(Products, Experts):
    """Experts with `Segments` as groups; what they keep of the pre-activation is padded: [P, F]."""

    def groups(self, counts_E: Tensor, n_rows: int) -> Segments:
        align = max(BLOCKS[kind] for kind in self.formats)
        if "nvfp4" in self.formats:
            align = max(align, lowp.segment_alignment(counts_E.device.type))
        padded_E = (counts_E + (align - 1)).div(align, rounding_mode="floor") * align
        ends_E = padded_E.cumsum(0)
        expert_R = torch.repeat_interleave(counts_E, output_size=n_rows)
        # How many zeros stand before each expert's rows.
        zeros_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
        place_R = torch.arange(n_rows, device=counts_E.device) + zeros_E[expert_R]
        if counts_E.is_cuda:  # which must not be asked how many rows there are
            rows = most_rows(n_rows, counts_E.numel(), align)
        else:
            rows = int(ends_E[-1])
        return Segments(place_R, ends_E.int(), rows)

    def forward(self, routed: Routed, keep: bool) -> tuple[Tensor, Tensor]:
        segments: Segments = routed.groups
        h_PF = self.pre_activation(routed)
        weight_P1 = segments.pad(routed.weight_R)[:, None]
        act_PF = h_PF.float().relu().square_().mul_(weight_P1).to(h_PF.dtype)
        y_PL = self._forward_product(act_PF, routed.down_ELF, segments)
        return y_PL.index_select(0, segments.place_R), h_PF

    def pre_activation(self, routed: Routed) -> Tensor:
        x_PL = routed.groups.pad(routed.rows(routed.x_TL))
        return self._forward_product(x_PL, routed.up_EFL, routed.groups)

    def backward(self, routed: Routed, h_RF: Tensor, dy_TL: Tensor, wanted: Wanted) -> Gradients:
        segments: Segments = routed.groups
        use = self.streams.next_use(self.name)
        weight_P1 = segments.pad(routed.weight_R)[:, None]
        relu_PF = h_RF.float().relu()
        act_PF = (relu_PF.square() * weight_P1).to(h_RF.dtype)
        dy_PL = segments.pad(routed.rows(dy_TL))
        dact_PF, ddown_ELF = self._backward_products(
            dy_PL, act_PF, routed.down_ELF, segments, (*use, "down"), wanted[1]
        )
        dh_PF = dact_PF.float() * relu_PF
        dweight_P = torch.linalg.vecdot(dh_PF, relu_PF)
        dh_PF = dh_PF.mul_(2 * weight_P1).to(h_RF.dtype)
        x_PL = segments.pad(routed.rows(routed.x_TL))
        dx_PL, dup_EFL = self._backward_products(
            dh_PF, x_PL, routed.up_EFL, segments, (*use, "up"), wanted[0]
        )
        place_R = segments.place_R
        dx_RL, dweight_R = dx_PL.index_select(0, place_R), dweight_P.index_select(0, place_R)
        return dx_RL, dweight_R, dup_EFL, ddown_ELF

    def _forward_product(self, x_P: Tensor, weight_E: Tensor, segments: Segments) -> Tensor:
        ends_E = segments.ends_E
        a, b = self.forward_input(x_P, ends_E), self.forward_weight(weight_E)
        return lowp.grouped_product(a, b, ends_E, x_P.dtype)

    def _backward_products(
        self,
        dy_P: Tensor,
        x_P: Tensor,
        weight_E: Tensor,
        segments: Segments,
        use: tuple[object, ...],
        wgrad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and, if wanted, of the weights."""
        ends_E = segments.ends_E
        for_dgrad, for_wgrad = self.gradient(dy_P, use, ends_E, wgrad=wgrad)
        weight = self.dgrad_weight(weight_E)
        dx_P = lowp.grouped_product(for_dgrad, weight, ends_E, x_P.dtype)
        if not wgrad:
            return dx_P, None
        x = self.wgrad_input(x_P, ends_E)
        return dx_P, lowp.grouped_wgrad(for_wgrad, x, ends_E, torch.float32)


def most_rows(n_rows: int, n_experts: int, align: int) -> int:
    """To which so many rows of so many experts can be padded at most."""
    return (n_rows + n_experts * (align - 1)) // align * align
