"""A linear layer whose three matrix products run in low precision.

Shapes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_hybrid.precision.operands import Products
from nemo_kernels import nvfp4


class QuantizedLinear(Products):
    """``(x [.., K], weight [N, K]) -> x W^T [.., N]``.

    Master weights and the optimizer are not touched by it: it quantizes the weight that it is given
    in every pass, and keeps x and the weight for the backward pass as they came. The weight's
    gradient is summed in fp32 and rounded once to the weight's dtype.
    """

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
        return nvfp4.product(a, b, x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        products: QuantizedLinear = ctx.products
        x_TK, weight_NK = ctx.saved_tensors
        use = products.streams.next_use(products.name)
        wgrad = ctx.needs_input_grad[1]  # frozen weights need none
        for_dgrad, for_wgrad = products.gradient(dy_TN.contiguous(), use, "dy", wgrad=wgrad)
        dx_TK = nvfp4.product(for_dgrad, products.dgrad_weight(weight_NK), x_TK.dtype)
        if not wgrad:
            return dx_TK, None, None
        dweight_NK = nvfp4.product(for_wgrad, products.wgrad_input(x_TK), torch.float32)
        return dx_TK, dweight_NK.to(ctx.weight_dtype), None
