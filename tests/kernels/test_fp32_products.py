"""Products with fp32 sums, against float64."""

from __future__ import annotations

import pytest
import torch

from helpers.bands import SABOTAGE, band
from nemo_hybrid.model.linear import Linear
from nemo_kernels import products
from nemo_kernels.products import add_fp32_product, fp32_product, mm, split_product, sum_in_fp32

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


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products of 20 x 64 by 64 x 9 and above go to oneDNN, whatever the CPU; and what went."""
    went: list[int] = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        went.append(a.numel() * b.shape[1])
        return by_onednn(a, b)

    by_onednn = products._by_onednn
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", counted)
    monkeypatch.setattr(products, "_LARGE", 20 * 64 * 9)
    return went


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_large_products_by_onednn(large: list[int]) -> None:
    """Every orientation of the operands, a place for the result, and what does not go there."""
    a, b = normal(20, 64), normal(64, 9)
    truth, total, out = a.double() @ b.double(), normal(20, 9), torch.empty(20, 9)
    added = truth + total
    add_fp32_product(total, a, b)
    assert mm(a, b, out=out) is out
    turned = mm(a.t().contiguous().t(), b.t().contiguous().t())
    for found in (mm(a, b), out, turned, fp32_product(a, b)):
        assert distance(found, truth) < band(FP32, 64)
    assert distance(total, added) < band(FP32, 65)
    assert distance(fp32_product(a.to(BF16), b.to(BF16)), truth) > SABOTAGE * band(FP32, 64)
    assert large == [20 * 64 * 9] * 6
    mm(a[:19], b), mm(a.double(), b.double())
    with torch.backends.mkldnn.flags(enabled=False):
        mm(a, b)
    assert len(large) == 6


def test_a_linear_layer_by_onednn(large: list[int]) -> None:
    layer, x = Linear(64, 9), normal(4, 5, 64).requires_grad_()
    dy = normal(4, 5, 9)
    layer.weight.data = normal(9, 64)
    y = layer(x)
    y.backward(dy)
    W, X, dY = layer.weight.detach().double(), x.detach().double(), dy.double()
    assert distance(y.detach(), X @ W.t()) < band(FP32, 64)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert distance(x.grad, dY @ W) < band(FP32, 9)
    truth = dY.flatten(0, 1).t() @ X.flatten(0, 1)
    assert distance(layer.weight.grad, truth) < band(FP32, 20)
    assert len(large) == 3
    layer(x[:, :1])  # a small one is torch's
    assert len(large) == 3


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
