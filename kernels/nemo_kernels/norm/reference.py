"""RMSNorm, plain and gated by groups, in plain PyTorch: the specification.

With h = x SiLU(gate) (or x), r = 1/sqrt(mean over the group of h^2 + eps) and y = h r w,

    dh = r (dy w) - h r^3 mean(dy w h)        dw = sum over tokens of dy h r

Both passes are written by hand and work on a few rows at a time: the forward pass keeps only its
inputs and r, and temporaries in fp32 stay small. In inference mode, where nothing is kept, torch's
own function takes fewer steps, which counts when tokens come one by one.

Shapes: R rows (all leading dimensions), D channels, G groups, g channels of a group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = {"cpu": 1 << 20}  # elements per block
_BLOCK_ELSEWHERE = 1 << 28


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if torch.is_inference_mode_enabled():
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], weight_D.to(wide), eps).to(x.dtype)
    return _RMSNorm.apply(x, None, weight_D, eps, x.shape[-1])


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, group_size: int
) -> Tensor:
    if torch.is_inference_mode_enabled():
        wide = torch.promote_types(x.dtype, torch.float32)
        h_Gg = (x.to(wide) * F.silu(gate.to(wide))).unflatten(-1, (-1, group_size))
        h = F.rms_norm(h_Gg, (group_size,), eps=eps).flatten(-2)
        return h.mul_(weight_D).to(x.dtype)
    return _RMSNorm.apply(x, gate, weight_D, eps, group_size)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float, group_size: int
    ) -> Tensor:
        x_RD, gate_RD = _rows(x), None if gate is None else _rows(gate)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight_Gg = weight_D.to(dtype).unflatten(0, (-1, group_size))
        y_RD = torch.empty(x_RD.shape, dtype=x.dtype, device=x.device)
        r_RG1 = torch.empty((len(x_RD), len(weight_Gg), 1), dtype=dtype, device=x.device)
        for rows in _row_blocks(x_RD):
            h_RGg = _gated(x_RD[rows], gate_RD, rows, dtype)[0].unflatten(1, weight_Gg.shape)
            square_RG1 = torch.linalg.vector_norm(h_RGg, dim=-1, keepdim=True).square_()
            r_RG1[rows] = square_RG1.div_(group_size).add_(eps).rsqrt_()
            y_RGg = y_RD[rows].unflatten(1, weight_Gg.shape)
            torch.mul(h_RGg * r_RG1[rows], weight_Gg, out=y_RGg)
        ctx.save_for_backward(x, gate, weight_D, r_RG1)
        return y_RD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        x, gate, weight_D, r_RG1 = ctx.saved_tensors
        x_RD, dy_RD, gate_RD = _rows(x), _rows(dy), None if gate is None else _rows(gate)
        dtype, groups = r_RG1.dtype, r_RG1.shape[1]
        weight_Gg = weight_D.to(dtype).unflatten(0, (groups, -1))
        dx_RD = torch.empty(x_RD.shape, dtype=x.dtype, device=x.device)
        dgate_RD = None if gate_RD is None else torch.empty_like(dx_RD, dtype=gate_RD.dtype)
        dweight_Gg = torch.zeros_like(weight_Gg)
        for rows in _row_blocks(x_RD):
            h_RD, silu_RD = _gated(x_RD[rows], gate_RD, rows, dtype)
            h_RGg, r = h_RD.unflatten(1, weight_Gg.shape), r_RG1[rows]
            dy_RGg = dy_RD[rows].to(dtype).unflatten(1, weight_Gg.shape)
            # Both sums over dy h as matrix-vector products of each group: one reading each.
            product_GRg = (dy_RGg * h_RGg).transpose(0, 1)
            dweight_Gg += (r.permute(1, 2, 0) @ product_GRg).squeeze(1)
            mean_RG1 = (product_GRg @ weight_Gg[..., None]).transpose(0, 1) / weight_Gg.shape[1]
            dh_RGg = (dy_RGg * weight_Gg).mul_(r).addcmul_(h_RGg, r.pow(3) * mean_RG1, value=-1)
            dh_RD = dh_RGg.flatten(1)
            if gate_RD is None or dgate_RD is None:
                dx_RD[rows] = dh_RD
                continue
            torch.mul(dh_RD, silu_RD, out=dx_RD[rows])
            dgate_RD[rows] = torch.ops.aten.silu_backward(
                dh_RD.mul_(x_RD[rows]), gate_RD[rows].to(dtype)
            )
        dgate = None if gate is None or dgate_RD is None else dgate_RD.view(gate.shape)
        dweight_D = dweight_Gg.flatten().to(weight_D.dtype)
        return dx_RD.view(x.shape), dgate, dweight_D, None, None


def _gated(
    x_RD: Tensor, gate_RD: Tensor | None, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """h and SiLU(gate) of a block of rows (without gate: x twice), in dtype."""
    x_RD = x_RD.to(dtype)
    if gate_RD is None:
        return x_RD, x_RD
    silu_RD = F.silu(gate_RD[rows].to(dtype))
    return x_RD * silu_RD, silu_RD


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _row_blocks(x_RD: Tensor) -> list[slice]:
    rows, channels = x_RD.shape
    step = max(1, _BLOCK.get(x_RD.device.type, _BLOCK_ELSEWHERE) // channels)
    return [slice(r, min(r + step, rows)) for r in range(0, rows, step)]
