"""The norms on GPUs: the plain one by torch's own kernel, the gated one in Triton.

Both compute in fp32 and round once. The backward passes keep inputs and 1 / rms alone. Sums over
rows are made in an order that the shape alone determines.

Shapes: R rows, D channels, G groups, g channels of a group, K shares of the weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.backend import Sizes, draw, relative_deviation
from nemo_kernels.launch import launch
from nemo_kernels.norm import gated_kernel, reference

DEVICE_TYPES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
"""CPU tensors only in Triton's interpreter."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_GROUP = 4096
_TILE = 2048  # channels of all rows that a program has at a time, where a group has no more
_PROGRAMS = 512  # of the backward pass, about: four per processor of a GPU


def refusal(dtype: torch.dtype, group_size: int) -> str:
    """Of the gated norm."""
    if dtype not in _DTYPES:
        return f"expected one of {_DTYPES}, got {dtype}"
    if group_size > MAX_GROUP:
        return f"expected groups of at most {MAX_GROUP} channels, got {group_size}"
    return ""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x.dtype != weight_D.dtype:  # torch's kernel wants one for all
        return reference.rms_norm(x, weight_D, eps)
    return F.rms_norm(x, x.shape[-1:], weight_D, eps)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, group_size: int
) -> Tensor:
    """``nemo_kernels.norm.gated_rms_norm``."""
    return _GatedRMSNorm.apply(x, gate, weight_D, eps, group_size)


def self_check(device_type: str, sizes: Sizes) -> float:
    """Largest deviation of both norms from the reference."""
    rows, width = 2 * sizes.tokens, sizes.heads * sizes.head_dim
    x, gate, weight = draw(device_type, *[(rows, width)] * 2, (width,))
    gated = relative_deviation(
        lambda norm, *t: norm(*t, 1e-5, width // sizes.groups),
        (gated_rms_norm, reference.gated_rms_norm),
        (x, gate, weight),
    )
    plain = relative_deviation(
        lambda norm, *t: norm(*t, 1e-5), (rms_norm, reference.rms_norm), (x, weight)
    )
    return max(gated, plain)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, group_size: int
    ) -> Tensor:
        x_RD, gate_RD, groups = _rows(x), _rows(gate), len(weight_D) // group_size
        y_RD = torch.empty(x_RD.shape, dtype=x.dtype, device=x.device)
        r_RG = torch.empty((len(x_RD), groups), dtype=torch.float32, device=x.device)
        options = _options(groups, group_size)
        tensors = (x_RD, gate_RD, weight_D.contiguous(), y_RD, r_RG)
        sizes = (len(x_RD), x_RD.stride(0), gate_RD.stride(0), eps, group_size)
        grid = (triton.cdiv(len(x_RD), options["ROWS"]) * groups,)
        launch(gated_kernel.gated_norm_kernel, grid, *tensors, *sizes, **options)
        ctx.save_for_backward(x, gate, weight_D, r_RG)
        ctx.group_size = group_size
        return y_RD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, gate, weight_D, r_RG = ctx.saved_tensors
        x_RD, gate_RD, dy_RD, (rows, groups) = _rows(x), _rows(gate), _rows(dy), r_RG.shape
        dx_RD = torch.empty(x_RD.shape, dtype=x.dtype, device=x.device)
        dgate_RD = torch.empty(x_RD.shape, dtype=gate.dtype, device=x.device)
        options = _options(groups, ctx.group_size)
        blocks = triton.cdiv(rows, options["ROWS"])
        steps = max(1, triton.cdiv(blocks, max(1, _PROGRAMS // groups)))
        shape = (triton.cdiv(blocks, steps), len(weight_D))
        dweight_KD = torch.empty(shape, dtype=torch.float32, device=x.device)
        tensors = (x_RD, gate_RD, weight_D.contiguous(), r_RG, dy_RD, dx_RD, dgate_RD, dweight_KD)
        strides = (x_RD.stride(0), gate_RD.stride(0), dy_RD.stride(0))
        sizes, grid = (rows, *strides, ctx.group_size, steps), (len(dweight_KD) * groups,)
        launch(gated_kernel.gated_norm_backward_kernel, grid, *tensors, *sizes, **options)
        dweight_D = dweight_KD.sum(0).to(weight_D.dtype)
        return dx_RD.view(x.shape), dgate_RD.view(gate.shape), dweight_D, None, None


def _rows(t: Tensor) -> Tensor:
    """[R, D], a view where a row's channels lie side by side."""
    t_RD = t.reshape(-1, t.shape[-1])
    return t_RD if t_RD.stride(1) == 1 else t_RD.contiguous()


def _options(groups: int, group_size: int) -> dict[str, Any]:
    """Eight channels for a thread; with more the backward pass spills in fp32 (Triton 3.6)."""
    channels = triton.next_power_of_2(group_size)
    rows = max(1, _TILE // channels)
    warps = max(1, min(16, rows * channels // 256))
    sizes = {"GROUPS": groups, "ROWS": rows, "CHANNELS": channels}
    return {**sizes, "num_warps": warps, "num_stages": 2}
