"""Linear layers without bias, whose weight may come in fp32 beside bf16 activations, and which may
have a low-rank adapter. Such a weight (see ``nemo_kernels.wide``) multiplies in the activations'
dtype as ever, but its gradient leaves in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemo_hybrid.model.init import Undrawn
from nemo_kernels.moe import LowRank
from nemo_kernels.products import fp32_product, goes_to_onednn, mm


class Adapter(nn.Module):
    """scale * B A beside a weight [.., D_out, D_in] (LoRA, arXiv 2106.09685): A [.., r, D_in] and
    B [.., D_out, r], in the weight's dtype. Where the weight is a stack, so are they."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        *stack, size_out, size_in = weight.shape
        self.scale = scale
        self.A = nn.Parameter(weight.new_empty(*stack, rank, size_in))
        self.B = nn.Parameter(weight.new_zeros(*stack, size_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[.., D_in] -> [.., D_out], of an adapter that is no stack."""
        return _product(_product(x, self.A) * self.scale, self.B)

    def low_rank(self) -> LowRank:
        """Of a stack, for products of experts."""
        return LowRank(self.A, self.B, self.scale)

    def added_to(self, weight: Tensor) -> Tensor:
        """weight + scale * B A, summed in fp32 and rounded once to the weight's dtype."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        product = torch.matmul(self.B.to(exact) * self.scale, self.A.to(exact))
        return product.add_(weight).to(weight.dtype)


class Linear(Undrawn, nn.Linear):
    """[.., D_in] -> [.., D_out], y = x W^T, plus what an adapter adds.

    ``low_precision``: what multiplies x by the weight instead, see ``nemo_hybrid.precision``; an
    adapter always multiplies in the activations' dtype.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.low_precision: Callable[[Tensor, Tensor], Tensor] | None = None
        self.lora: Adapter | None = None

    def forward(self, x: Tensor) -> Tensor:
        multiply = self.low_precision or _product
        y = multiply(x, self.weight)
        return y if self.lora is None else y + self.lora(x)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == x.dtype and not goes_to_onednn(x, len(weight)):
        return F.linear(x, weight)
    return _Product.apply(x, weight)


class _Product(torch.autograd.Function):
    """Of a weight whose gradient is wider, or of matrices that torch does not multiply itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return mm(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = mm(dy.flatten(0, -2), weight).view_as(x)
        if ctx.needs_input_grad[1]:
            dweight = fp32_product(dy.flatten(0, -2).t(), x.flatten(0, -2))
        return dx, dweight
