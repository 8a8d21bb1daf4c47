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

from nemo_kernels.lowp.operand import Operand


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """:func:`nemo_kernels.lowp.product`."""
    return _scaled(_mm(a.matrix, b.matrix.mT), a, b).to(dtype)


def grouped_product(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`nemo_kernels.lowp.grouped_product`; waits for a GPU, which has to tell the ends."""
    out_PN = a.matrix.new_zeros(a.matrix.shape[0], b.matrix.shape[1], dtype=dtype)
    for e, (rows, weight) in enumerate(zip(segments(ends_E), b.matrix, strict=True)):
        out_PN[rows] = _scaled(_mm(a.matrix[rows], weight.mT), a, b, e)
    return out_PN


def grouped_wgrad(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`nemo_kernels.lowp.grouped_wgrad`; waits for a GPU, which has to tell the ends."""
    (m, _), (n, _) = a.matrix.shape, b.matrix.shape
    out_EMN = a.matrix.new_empty(ends_E.numel(), m, n, dtype=dtype)
    for e, rows in enumerate(segments(ends_E)):
        out_EMN[e] = _scaled(_mm(a.matrix[:, rows], b.matrix[:, rows].mT), a, b, e)
    return out_EMN


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_cpu and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _scaled(result: Tensor, a: Operand, b: Operand, expert: int | None = None) -> Tensor:
    """Times both tensor scales, one after the other: their product may be too small for fp32."""
    for scale in (a.tensor_scale, b.tensor_scale):
        if scale is not None:
            result.mul_(scale if expert is None else scale[expert])
    return result


def segments(ends_E: Tensor) -> list[slice]:
    """Rows of each expert; waits for a GPU."""
    ends = [0, *ends_E.tolist()]
    return [slice(start, end) for start, end in pairwise(ends)]
