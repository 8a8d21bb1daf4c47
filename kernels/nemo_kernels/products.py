"""Matrix products whose sums are fp32, whatever the operands are.

GPUs multiply bf16 numbers exactly and add in fp32; a result in fp32 keeps that. CPUs have no such
product, and take fp32 operands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, summed and left in fp32 (of fp64: in fp64)."""
    exact = torch.promote_types(a.dtype, torch.float32)
    if not a.is_cpu:
        return torch.mm(a, b, out_dtype=exact)
    return torch.mm(a.to(exact), b.to(exact))


def add_fp32_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a matrix in fp32 (of fp64: in fp64), in place."""
    if not a.is_cpu and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
