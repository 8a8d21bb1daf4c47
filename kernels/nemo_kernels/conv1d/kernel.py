"""Causal depthwise convolution with SiLU in Triton: a kernel forward, one backward, one per step.

The backward pass keeps x alone and computes z once more. It gives sums of each tile of tokens for
weight and bias, which are added up afterwards, in one order. Computed in fp32, cast at the store.

Shapes: B batch, S sequence, C channels, K kernel width, J = K-1, T tiles of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.backend import Sizes, draw, relative_deviation
from nemo_kernels.checks import expect, expect_device
from nemo_kernels.conv1d import reference, tap_kernel
from nemo_kernels.documents import Documents
from nemo_kernels.launch import launch

DEVICE_TYPES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
"""CPU tensors only in Triton's interpreter."""
MAX_TAPS = 4
"""A token and the three before it, which a program holds."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TOKENS, _CHANNELS = 64, 256
_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3}


def causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Documents | None = None
) -> Tensor:
    """``nemo_kernels.conv1d.causal_conv1d``. Channels of x lie side by side; tokens may be apart.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
    """
    _check("x_BSC", x_BSC, 3, weight_CK, bias_C)
    if x_BSC.stride(2) != 1:
        raise ValueError(f"x_BSC: expected channels side by side, got strides {x_BSC.stride()}")
    seq_idx_BS = None
    if documents is not None:
        seq_idx_BS = documents.seq_idx_BS.contiguous()
        expect("documents.seq_idx_BS", seq_idx_BS, tuple(x_BSC.shape[:2]), torch.int32)
        expect_device(x_BSC, **{"documents.seq_idx_BS": seq_idx_BS})
    y_BSC: Tensor = _CausalConv1d.apply(x_BSC, weight_CK, bias_C, seq_idx_BS)
    return y_BSC


def causal_conv1d_step(
    x_BC: Tensor, state_BCJ: Tensor, weight_CK: Tensor, bias_C: Tensor
) -> Tensor:
    """``nemo_kernels.conv1d.causal_conv1d_step``; no gradients.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
    """
    _check("x_BC", x_BC, 2, weight_CK, bias_C)
    rows, channels = x_BC.shape
    expect("state_BCJ", state_BCJ, (rows, channels, weight_CK.shape[1] - 1), x_BC.dtype)
    expect_device(x_BC, state_BCJ=state_BCJ)
    y_BC = torch.empty(x_BC.shape, dtype=x_BC.dtype, device=x_BC.device)
    # Not fewer channels than threads: the thread that moves one on is the one that has read it.
    grid = (rows * triton.cdiv(channels, _CHANNELS),)
    tensors = (x_BC, state_BCJ, weight_CK.contiguous(), bias_C.contiguous(), y_BC)
    sizes = (channels, *x_BC.stride(), *state_BCJ.stride(), weight_CK.shape[1], _CHANNELS)
    moved = sum(t.nbytes for t in (*tensors, state_BCJ))
    launch(tap_kernel.step_kernel, grid, *tensors, *sizes, moved=moved, **_OPTIONS)
    return y_BC


def refusal(x: Tensor, weight_CK: Tensor) -> str:
    taps = weight_CK.shape[1]
    if x.dtype not in _DTYPES or not 1 <= taps <= MAX_TAPS:
        return f"expected one of {_DTYPES} and 1 to {MAX_TAPS} taps, got {x.dtype} and {taps}"
    return ""


def self_check(device_type: str, sizes: Sizes) -> float:
    return checked(causal_conv1d, device_type, sizes)


def checked(convolve: Callable[..., Tensor], device_type: str, sizes: Sizes) -> float:
    """Largest deviation from the reference, with documents that begin amid tiles, in a part of the
    channels that lie side by side."""
    length, channels = sizes.tokens, sizes.heads * sizes.head_dim + 2 * sizes.groups * sizes.state
    x_BSC, *others = draw(device_type, (2, length, channels + 64), (channels, 4), (channels,))
    numbers_BS = torch.stack([torch.arange(length) // 37, torch.arange(length) // 555])
    documents = Documents.from_numbers(numbers_BS).to(device_type)
    return relative_deviation(
        lambda impl, x, *t: impl(x[..., :channels], *t, documents),
        (convolve, reference.causal_conv1d),
        (x_BSC, *others),
    )


def _check(name: str, x: Tensor, dims: int, weight_CK: Tensor, bias_C: Tensor) -> None:
    expect(name, x, (None,) * dims)
    expect("weight_CK", weight_CK, (x.shape[-1], None))
    expect("bias_C", bias_C, (x.shape[-1],))
    expect_device(x, weight_CK=weight_CK, bias_C=bias_C)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, seq_idx_BS: Tensor | None
    ) -> Tensor:
        y_BSC = torch.empty(x_BSC.shape, dtype=x_BSC.dtype, device=x_BSC.device)
        inputs = (x_BSC, weight_CK.contiguous(), bias_C.contiguous(), seq_idx_BS)
        _over_tiles(tap_kernel.forward_kernel, *inputs, y_BSC)
        ctx.save_for_backward(*inputs)
        return y_BSC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_BSC, weight_CK, bias_C, seq_idx_BS = ctx.saved_tensors
        (rows, length, channels), taps = x_BSC.shape, weight_CK.shape[1]
        dx_BSC = torch.empty(x_BSC.shape, dtype=x_BSC.dtype, device=x_BSC.device)
        # Of each tile; the bias' stands behind those of the taps.
        tiles = rows * triton.cdiv(length, _TOKENS)
        shape = (tiles, taps + 1, channels)
        parts_TKC = torch.empty(shape, dtype=torch.float32, device=x_BSC.device)
        inputs = (x_BSC, weight_CK, bias_C, seq_idx_BS, dy_BSC.contiguous())
        _over_tiles(tap_kernel.backward_kernel, *inputs, dx_BSC, parts_TKC)
        sums_KC = parts_TKC.sum(0)
        if weight_CK.dtype == bias_C.dtype:
            sums_KC = sums_KC.to(bias_C.dtype)  # one conversion for both
        dweight_CK, dbias_C = sums_KC[:taps].t(), sums_KC[taps]
        return dx_BSC, dweight_CK.to(weight_CK.dtype), dbias_C.to(bias_C.dtype), None


def _over_tiles(kernel: Any, x_BSC: Tensor, weight_CK: Tensor, *tensors: Tensor | None) -> None:
    rows, length, channels = x_BSC.shape
    grid = (rows * triton.cdiv(length, _TOKENS) * triton.cdiv(channels, _CHANNELS),)
    sizes = (length, channels, *x_BSC.stride()[:2], weight_CK.shape[1], _TOKENS, _CHANNELS)
    launch(kernel, grid, x_BSC, weight_CK, *tensors, *sizes, **_OPTIONS)
