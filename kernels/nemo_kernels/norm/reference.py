"""RMSNorm in plain PyTorch: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x_fp32 = x.float()
    scale = (x_fp32.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x_fp32 * scale * weight_D.float()).to(x.dtype)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, group_size: int
) -> Tensor:
    gated = (x.float() * F.silu(gate.float())).unflatten(-1, (-1, group_size))
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((gated * scale).flatten(-2) * weight_D.float()).to(x.dtype)
