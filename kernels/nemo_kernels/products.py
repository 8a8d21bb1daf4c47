"""Matrix products whose sums are fp32, whatever the operands are.

GPUs multiply bf16 numbers exactly and add in fp32; a result in fp32 keeps that. CPUs have no such
product, and take fp32 operands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices or batches of them, summed and left in fp32 (of fp64: in fp64)."""
    exact = torch.promote_types(a.dtype, torch.float32)
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if not a.is_cpu:
        return multiply(a, b, out_dtype=exact)
    return multiply(a.to(exact), b.to(exact))


def add_fp32_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a matrix in fp32 (of fp64: in fp64), in place."""
    if not a.is_cpu and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, a and the result in fp32. Where b is bf16, a is taken as the sum of two
    bf16 numbers, which misses each of its elements by at most 2^-17 of it: both products are exact
    but for their sums, and run on a GPU's matrix units, which plain fp32 products do not."""
    if b.dtype != torch.bfloat16:
        return torch.mm(a, b.to(a.dtype))
    high = a.to(b.dtype)
    total = fp32_product(high, b)
    add_fp32_product(total, (a - high).to(b.dtype), b)
    return total


def sum_in_fp32() -> None:
    """Let libraries round no partial sum of bf16 products to bf16, as torch allows them by default,
    and no operand of an fp32 product to TF32, as containers allow by their environment: sums are
    products with ones here."""
    torch.set_float32_matmul_precision("highest")
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
