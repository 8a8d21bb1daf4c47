"""Products with fp32 sums, against float64."""

from __future__ import annotations

import pytest
import torch

from helpers.bands import SABOTAGE, band
from nemo_kernels.products import add_fp32_product, fp32_product, split_product, sum_in_fp32

BF16, FP32 = torch.bfloat16, torch.float32


def normal(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_sums_are_fp32(dtype: torch.dtype) -> None:
    a, b = normal(20, 64, dtype=dtype), normal(64, 9, dtype=dtype)
    truth, total = a.double() @ b.double(), normal(20, 9)
    assert distance(fp32_product(a, b), truth) < band(FP32, 64)
    truth = truth + total
    add_fp32_product(total, a, b)
    assert distance(total, truth) < band(FP32, 65)
    assert distance(total.to(BF16), truth) > SABOTAGE * band(FP32, 65)


def test_two_halves_in_bf16_are_nearly_fp32() -> None:
    """Rounded at 2^-17, where a single bf16 number would be at 2^-9."""
    a, b = normal(20, 64), normal(64, 9, dtype=BF16)
    truth = a.double() @ b.double()
    found = split_product(a, b)
    assert found.dtype == FP32
    assert distance(found, truth) < 2**-17 + band(FP32, 128)
    assert distance(fp32_product(a.to(BF16), b), truth) > SABOTAGE * distance(found, truth)
    exact = split_product(a, b.float())  # nothing is split
    assert distance(exact, truth) < band(FP32, 64)


def test_no_library_may_round_sums() -> None:
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    try:
        torch.set_float32_matmul_precision("high")
        sum_in_fp32()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]
