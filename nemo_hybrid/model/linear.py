"""Linear layers without bias, whose weight may come in fp32 beside bf16 activations.

Where one weight is used several times in a pass, each use rounds its share of the gradient to the
weight's dtype, and small shares are lost in the sum. Given as an fp32 copy, the weight multiplies
in the activations' dtype as ever, but its gradient leaves in fp32: the shares add up there, and
the copy's own backward pass rounds their sum once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """[.., D_in] -> [.., D_out], y = x W^T.

    ``low_precision``: what multiplies x by the weight instead, see ``nemo_hybrid.precision``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.low_precision: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.low_precision is not None:
            return self.low_precision(x, self.weight)
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight)
        return _WideGradient.apply(x, self.weight)


class _WideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows_dy, rows_x = dy.flatten(0, -2), x.flatten(0, -2)
        if dy.is_cuda:
            dweight = torch.mm(rows_dy.t(), rows_x, out_dtype=torch.float32)
        else:
            dweight = torch.mm(rows_dy.t().float(), rows_x.float())
        return dy @ weight, dweight
