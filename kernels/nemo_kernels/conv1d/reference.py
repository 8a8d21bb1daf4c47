"""Causal depthwise convolution in plain PyTorch: the specification.

The convolution runs over one buffer of rows in which J zero rows stand before every document and
after the last one. So no tap reaches another document, forward or backward, and the same two
functions serve packed and unpacked sequences. The backward pass is written by hand because torch's
own weight gradient of a depthwise convolution takes some ten times as long on a CPU.

Shapes: B batch, S sequence, C channels, K kernel width, J = K-1, R rows of the
buffer, O = R-J rows of a valid convolution over it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 18  # elements per block of the weight gradient: a few such tensors fit an L2 cache

Document = tuple[int, int, int]


def causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, seq_idx_BS: Tensor | None = None
) -> Tensor:
    if seq_idx_BS is None:
        documents = [(row, 0, x_BSC.shape[1]) for row in range(len(x_BSC))]
    else:
        documents = _documents(seq_idx_BS)
    return _CausalConv1d.apply(x_BSC, weight_CK, bias_C, documents)


def causal_conv1d_step(
    x_BC: Tensor, state_BCJ: Tensor, weight_CK: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    window_BCK = torch.cat((state_BCJ, x_BC[..., None].to(state_BCJ.dtype)), dim=-1)
    y_BC = torch.addcmul(bias_C, window_BCK[..., 0], weight_CK[:, 0])
    for k in range(1, weight_CK.shape[1]):
        y_BC = torch.addcmul(y_BC, window_BCK[..., k], weight_CK[:, k])
    return F.silu(y_BC).to(x_BC.dtype), window_BCK[..., 1:]


def conv_state(x_BSC: Tensor, kernel: int) -> Tensor:
    keep = kernel - 1
    last_BJC = x_BSC[:, max(0, x_BSC.shape[1] - keep) :]
    return F.pad(last_BJC, (0, 0, keep - last_BJC.shape[1], 0)).transpose(1, 2).contiguous()


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: list[Document]
    ) -> Tensor:
        pad = weight_CK.shape[1] - 1
        weight, bias = weight_CK.to(x_BSC.dtype), bias_C.to(x_BSC.dtype)
        rows_OC = _depthwise(_spread(x_BSC, documents, pad), weight, bias)
        z_BSC = _collect(rows_OC, documents, pad, first=0).view(x_BSC.shape)
        ctx.save_for_backward(x_BSC, weight_CK, bias_C, z_BSC)
        ctx.documents = documents
        return F.silu(z_BSC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_BSC, weight_CK, bias_C, z_BSC = ctx.saved_tensors
        pad = weight_CK.shape[1] - 1
        dz_BSC = torch.ops.aten.silu_backward(dy_BSC, z_BSC)
        dz_RC = _spread(dz_BSC, ctx.documents, pad)
        dx_OC = _depthwise(dz_RC, weight_CK.to(dz_RC.dtype).flip(1), None)
        dx_BSC = _collect(dx_OC, ctx.documents, pad, first=pad).view(x_BSC.shape)
        dweight_KC = _weight_gradient(_spread(x_BSC, ctx.documents, pad), dz_RC[pad:])
        dbias_C = dz_BSC.sum((0, 1), dtype=dweight_KC.dtype)
        return dx_BSC, dweight_KC.t().to(weight_CK.dtype), dbias_C.to(bias_C.dtype), None


def _documents(seq_idx_BS: Tensor) -> list[Document]:
    """Batch row, first token and end of every document, in order."""
    ends_BS = torch.ones_like(seq_idx_BS, dtype=torch.bool)
    ends_BS[:, :-1] = seq_idx_BS[:, 1:] != seq_idx_BS[:, :-1]
    documents: list[Document] = []
    for row, last in ends_BS.nonzero().tolist():
        start = documents[-1][2] if documents and documents[-1][0] == row else 0
        documents.append((row, start, last + 1))
    return documents


def _spread(x_BSC: Tensor, documents: list[Document], pad: int) -> Tensor:
    """The buffer of all documents' tokens with pad zero rows before, between and after, [R,C]."""
    zeros = x_BSC.new_zeros(pad, x_BSC.shape[2])
    pieces = [p for row, start, end in documents for p in (zeros, x_BSC[row, start:end])]
    return torch.cat([*pieces, zeros])


def _collect(rows_OC: Tensor, documents: list[Document], pad: int, first: int) -> Tensor:
    """All documents' rows without those between; the first document begins at row first."""
    pieces = []
    for _, start, end in documents:
        pieces.append(rows_OC[first : first + end - start])
        first += end - start + pad
    return torch.cat(pieces)


def _depthwise(rows_RC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """Valid depthwise convolution along the rows, [O,C]."""
    # As a channels-last image of height 1 the buffer is convolved without being transposed.
    image_1C1R = rows_RC[None, None].permute(0, 3, 1, 2)
    y_1C1O = F.conv2d(image_1C1R, weight_CK[:, None, None], bias_C, groups=len(weight_CK))
    return y_1C1O[0, :, 0].t().contiguous()


def _weight_gradient(x_RC: Tensor, dz_OC: Tensor) -> Tensor:
    """sum_o x[o+k,c] dz[o,c] in fp32 or wider, [K,C]."""
    outputs, channels = dz_OC.shape
    kernel = len(x_RC) - outputs + 1
    x_KOC = x_RC.as_strided((kernel, outputs, channels), (channels, channels, 1))
    step = max(1, _BLOCK // (kernel * channels)) if x_RC.device.type == "cpu" else outputs
    dtype = torch.promote_types(x_RC.dtype, torch.float32)
    total_KC = x_RC.new_zeros(kernel, channels, dtype=dtype)
    for o in range(0, outputs, step):
        total_KC += (x_KOC[:, o : o + step] * dz_OC[o : o + step]).sum(1, dtype=dtype)
    return total_KC
