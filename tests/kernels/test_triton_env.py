"""The repaired interpreter against torch, and that it needed the repair.

On a GPU the same kernels show that the repair agrees with what the GPU does.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from helpers import triton_env
from helpers.triton_env import DEVICE, MULTIPLIES_FP4
from nemo_kernels.lowp import reference

BLOCK = 1024


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.float32).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


E2M1 = tl.constexpr("e2m1")


@triton.jit
def dot_scaled_kernel(a, a_scale, b, b_scale, y_ptr, M: tl.constexpr, K: tl.constexpr):
    row = tl.arange(0, M)[:, None]
    codes = row * (K // 2) + tl.arange(0, K // 2)[None, :]
    scales = row * (K // 16) + tl.arange(0, K // 16)[None, :]
    y = tl.dot_scaled(
        tl.load(a + codes), tl.load(a_scale + scales), E2M1,
        tl.load(b + codes).T, tl.load(b_scale + scales), E2M1,
    )  # fmt: skip
    tl.store(y_ptr + row * M + tl.arange(0, M)[None, :], y)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(BLOCK, dtype=dtype, device=DEVICE)
    cast_kernel[(1,)](x.to(DEVICE), y, BLOCK=BLOCK)
    return y.cpu()


def values() -> Tensor:
    """fp32 numbers over decades, with every kind of tie of bf16 and e4m3, and beyond their ends."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCK, generator=generator) * 10 ** torch.linspace(-4, 4, BLOCK)
    x[:256] = torch.arange(256) * 0.5 + 16  # steps of e4m3 are 2 to 16 here
    x[256:512] = (torch.arange(256) * 2**15 + 0x3F800000).int().view(torch.float32)  # bf16 ties
    x[512:520] = torch.tensor([0.0, -0.0, 448, 464, 480, -1e9, 2**-10, 3 * 2**-10])
    return x


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize == 1:
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return x.to(dtype)


def differing(a: Tensor, b: Tensor) -> int:
    return int((a.view(torch.uint8) != b.view(torch.uint8)).sum())


FORMATS = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16]


@pytest.mark.parametrize("dtype", FORMATS)
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = values() if dtype != torch.float16 else values().clamp(-6e4, 6e4)
    assert differing(cast(x, dtype), rounded(x, dtype)) == 0


@pytest.mark.parametrize("dtype", FORMATS)
def test_casts_widen_exactly_and_keep_nan(dtype: torch.dtype) -> None:
    x = rounded(values(), dtype)
    assert differing(cast(x, torch.float32), x.float()) == 0
    x = torch.full((BLOCK,), float("nan"))
    assert cast(x, dtype).float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_accumulates_in_fp32(dtype: torch.dtype) -> None:
    a, b = dot_operands(dtype)
    torch.testing.assert_close(dot(a, b).cpu(), a.double() @ b.double(), rtol=1e-5, atol=1e-5,
                               check_dtype=False)  # fmt: skip


def dot_operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Small integers, so that no format and no GPU's tf32 rounds them."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-100, 100, (16, 16), generator=generator).to(dtype) for _ in range(2))
    return a, b


def dot(a: Tensor, b: Tensor) -> Tensor:
    y = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), y, N=16)
    return y


def dot_scaled(a: reference.Quantized, b: reference.Quantized) -> Tensor:
    M, half = a.data.shape
    y = torch.empty(M, M, device=DEVICE)
    operands = (t.to(DEVICE) for q in (a, b) for t in (q.data, q.block_scale))
    dot_scaled_kernel[(1,)](*operands, y, M=M, K=2 * half)
    return y.cpu()


def scaled_operands() -> tuple[reference.Quantized, reference.Quantized]:
    """All bytes and all finite positive scales."""
    generator = torch.Generator().manual_seed(2)
    data = torch.randperm(2 * 128 * 64, generator=generator).to(torch.uint8).view(2, 128, 64)
    scale = torch.randperm(2 * 128 * 8, generator=generator).remainder(0x7F).to(torch.uint8)
    scale = scale.view(2, 128, 8).view(torch.float8_e4m3fn)
    a, b = (reference.Quantized(d, s, torch.ones(())) for d, s in zip(data, scale, strict=True))
    return a, b


def scaled_error(a: reference.Quantized, b: reference.Quantized) -> float:
    """Largest error relative to the sum of magnitudes."""
    x, y = (reference.dequantize(q, torch.float64) for q in (a, b))
    return float(((dot_scaled(a, b) - x @ y.T).abs() / (x.abs() @ y.abs().T)).max())


@pytest.mark.skipif(not MULTIPLIES_FP4, reason="needs the interpreter or an sm_100 GPU")
def test_scaled_dot_is_that_of_dequantized_operands() -> None:
    assert scaled_error(*scaled_operands()) < 128 * 2**-24


@pytest.mark.skipif(not MULTIPLIES_FP4, reason="needs the interpreter or an sm_100 GPU")
def test_scaled_dot_keeps_a_nan_scale() -> None:
    a, b = scaled_operands()
    a.block_scale.view(torch.uint8)[3, 5] = 0x7F
    assert dot_scaled(a, b).isnan().any(1).nonzero().tolist() == [[3]]


@pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter")
def test_the_stock_interpreter_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails on a new version of Triton, look whether the repair can go."""
    stock = triton_env.stock_convert_float
    monkeypatch.setattr(interpreter, "_convert_float", stock)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", triton_env.stock_create_dot)
    x = values()
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        assert differing(cast(x, dtype), rounded(x, dtype)) > 100
    a, b = dot_operands(torch.bfloat16)
    assert not torch.allclose(dot(a, b), a.float() @ b.float(), rtol=0.1)
    if triton_env.stock_create_dot_scaled:
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, "create_dot_scaled", triton_env.stock_create_dot_scaled
        )
        assert not scaled_error(*scaled_operands()) < 0.1


def test_an_argument_that_a_kernel_does_not_have_is_refused() -> None:
    x = torch.ones(BLOCK, device=DEVICE)
    with pytest.raises(KeyError, match="ROWS was specified but unrecognised"):
        cast_kernel[(1,)](x, x, BLOCK=BLOCK, ROWS=1)
