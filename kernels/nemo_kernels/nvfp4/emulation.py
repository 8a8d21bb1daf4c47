"""Products of operands whose numbers bf16 holds exactly, on a device without units for them.

A product of two such numbers is exact in fp32, so sums differ from those of native units in the
order of additions alone. Where a result is rounded to less than fp32, this happens once, after the
tensor scales.

Shapes: M, N dimensions of a product, K that it sums over; P rows of E experts' segments.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nemo_kernels.nvfp4.operand import Operand


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T [M, N] of operands over [M, K] and [N, K]."""
    return _scaled(_mm(a.matrix, b.matrix.mT), _scale(a, b), dtype)


def grouped_product(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Row p of expert e times b[e]^T: [P, N], of a over [P, K] and b over [E, N, K]. Zeros after
    the last end. Waits for a GPU, which has to tell the ends."""
    out_PN = a.matrix.new_zeros(a.matrix.shape[0], b.matrix.shape[1], dtype=dtype)
    scale = _scale(a, b)
    for e, (rows, weight) in enumerate(zip(_segments(ends_E), b.matrix, strict=True)):
        result = _mm(a.matrix[rows], weight.mT)
        out_PN[rows] = _scaled(result, None if scale is None else scale[e], dtype)
    return out_PN


def grouped_wgrad(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over each expert's rows of outer products: [E, M, N], of a over [M, P] and b over
    [N, P]. Waits for a GPU, which has to tell the ends."""
    (m, _), (n, _) = a.matrix.shape, b.matrix.shape
    out_EMN = a.matrix.new_empty(ends_E.numel(), m, n, dtype=dtype)
    scale = _scale(a, b)
    for e, rows in enumerate(_segments(ends_E)):
        result = _mm(a.matrix[:, rows], b.matrix[:, rows].mT)
        out_EMN[e] = _scaled(result, None if scale is None else scale[e], dtype)
    return out_EMN


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _scale(a: Operand, b: Operand) -> Tensor | None:
    if a.tensor_scale is None or b.tensor_scale is None:
        return a.tensor_scale if b.tensor_scale is None else b.tensor_scale
    return a.tensor_scale * b.tensor_scale


def _scaled(result: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (result if scale is None else result.mul_(scale)).to(dtype)


def _segments(ends_E: Tensor) -> list[slice]:
    ends = [0, *ends_E.tolist()]
    return [slice(start, end) for start, end in pairwise(ends)]
