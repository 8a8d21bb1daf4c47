"""Matrix products whose sums are fp32, whatever the operands are.

GPUs multiply bf16 numbers exactly and add in fp32; a result in fp32 keeps that. CPUs have no such
product, and take fp32 operands.

Torch leaves fp32 products on CPUs to MKL, which does not use the 512-bit units of AMD's. There the
large ones go to oneDNN, which torch brings as well and which takes half the time for them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_LARGE = 1 << 22
"""Multiply-adds from which oneDNN's longer way to the first one is made up for."""


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of matrices, by the library that is the fastest on this CPU. Where shapes change from
    call to call `torch.mm` is better: oneDNN prepares itself anew for each."""
    if not goes_to_onednn(a, b.shape[1]):
        return torch.mm(a, b, out=out)
    product = _by_onednn(a, b)
    return product if out is None else out.copy_(product)


def goes_to_onednn(a: Tensor, columns: int) -> bool:
    """Whether `mm` takes oneDNN for [.., M, K] by [K, columns]."""
    large = a.is_cpu and a.dtype == torch.float32 and a.numel() * columns >= _LARGE
    return large and bool(torch.backends.mkldnn.enabled) and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """On an AMD CPU with AVX-512, if torch still has what its own compiler calls there."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        few = torch.arange(6.0).view(2, 3)
        right = torch.equal(_by_onednn(few, few.t()), few.mm(few.t()))
    except Exception:  # what a library without it raises
        return False
    return amd and right and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices or batches of them, summed and left in fp32 (of fp64: in fp64)."""
    exact = torch.promote_types(a.dtype, torch.float32)
    if a.is_cpu:
        return (mm if a.dim() == 2 else torch.bmm)(a.to(exact), b.to(exact))
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=exact)


def add_fp32_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a matrix in fp32 (of fp64: in fp64), in place."""
    if not a.is_cpu and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    a, b = a.to(total.dtype), b.to(total.dtype)
    if goes_to_onednn(a, b.shape[1]):
        total.add_(_by_onednn(a, b))
    else:
        total.addmm_(a, b)


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
