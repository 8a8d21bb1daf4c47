"""Causal depthwise convolution in plain PyTorch: the specification.

Every document is convolved for itself, as one multiply-add per tap over a slice of its rows, so no
tap reaches another document, forward or backward. On a CPU this is faster than torch's depthwise
convolution, whose weight gradient takes some ten times as long, and needs no padded copy; a
document's slices stay in the cache. Computed in fp32, cast at the store.

Shapes: B batch, S sequence, C channels, K kernel width, J = K-1, n tokens of a document, m of the
longest one or of a piece of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.documents import Documents

_POSITIONS = 8192
"""Of longer documents as many at a time have products in the weight's gradient: memory."""


def causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Documents | None = None
) -> Tensor:
    rows, length, _ = x_BSC.shape
    spans = documents.spans if documents else tuple((row, 0, length) for row in range(rows))
    return _CausalConv1d.apply(x_BSC, weight_CK, bias_C, spans)


def causal_conv1d_step(
    x_BC: Tensor, state_BCJ: Tensor, weight_CK: Tensor, bias_C: Tensor
) -> Tensor:
    inputs = [*state_BCJ.unbind(-1), x_BC]
    y_BC = torch.addcmul(bias_C, x_BC, weight_CK[:, -1])
    for k, input_BC in enumerate(inputs[:-1]):
        y_BC = torch.addcmul(y_BC, input_BC, weight_CK[:, k])
        input_BC.copy_(inputs[k + 1])
    return F.silu(y_BC).to(x_BC.dtype)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor,
        spans: tuple[tuple[int, int, int], ...],
    ) -> Tensor:
        dtype = torch.promote_types(x_BSC.dtype, torch.float32)
        weight_KC, bias = weight_CK.t().to(dtype).contiguous(), bias_C.to(dtype)
        z_BSC = torch.empty(x_BSC.shape, dtype=dtype, device=x_BSC.device)
        for row, start, end in spans:
            x_nC, z_nC = x_BSC[row, start:end].to(dtype), z_BSC[row, start:end]
            torch.addcmul(bias, x_nC, weight_KC[-1], out=z_nC)
            for j in range(1, min(len(weight_KC), end - start)):
                z_nC[j:].addcmul_(x_nC[:-j], weight_KC[-1 - j])
        ctx.save_for_backward(x_BSC, weight_CK, bias_C, z_BSC.to(x_BSC.dtype))
        ctx.spans = spans
        return F.silu(z_BSC).to(x_BSC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_BSC, weight_CK, bias_C, z_BSC = ctx.saved_tensors
        dtype = torch.promote_types(x_BSC.dtype, torch.float32)
        weight_KC = weight_CK.t().to(dtype).contiguous()
        longest = max((end - start for _, start, end in ctx.spans), default=0)
        longest = min(longest, _POSITIONS)
        dz_BSC = torch.ops.aten.silu_backward(dy_BSC, z_BSC)
        dx_BSC = torch.empty(x_BSC.shape, dtype=dtype, device=x_BSC.device)
        # Products are first added over documents, and pieces of them, position by position.
        dweight_KmC = x_BSC.new_zeros(len(weight_KC), longest, len(weight_CK), dtype=dtype)
        for row, start, end in ctx.spans:
            n = end - start
            x_nC, dz_nC = x_BSC[row, start:end].to(dtype), dz_BSC[row, start:end].to(dtype)
            dx_nC = torch.mul(dz_nC, weight_KC[-1], out=dx_BSC[row, start:end])
            for j in range(min(len(weight_KC), n)):
                if j:
                    dx_nC[:-j].addcmul_(dz_nC[j:], weight_KC[-1 - j])
                pieces = zip(x_nC[: n - j].split(longest), dz_nC[j:].split(longest), strict=True)
                for x_mC, dz_mC in pieces:
                    dweight_KmC[-1 - j, : len(x_mC)].addcmul_(x_mC, dz_mC)
        dweight_CK = dweight_KmC.sum(1).t().to(weight_CK.dtype)
        dbias_C = dz_BSC.sum((0, 1), dtype=dtype).to(bias_C.dtype)
        return dx_BSC.to(x_BSC.dtype), dweight_CK, dbias_C, None
