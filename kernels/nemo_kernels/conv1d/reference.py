"""Causal depthwise convolution in plain PyTorch: the specification.

Shapes: B batch, S sequence, C channels, K kernel width, J = K-1 inputs kept for decoding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, seq_idx_BS: Tensor | None = None
) -> Tensor:
    kernel = weight_CK.shape[1]
    weight_CK, bias_C = weight_CK.to(x_BSC.dtype), bias_C.to(x_BSC.dtype)
    y_BSC = torch.addcmul(bias_C, x_BSC, weight_CK[:, -1])
    for distance in range(1, min(kernel, x_BSC.shape[1])):
        earlier_BSC = F.pad(x_BSC[:, :-distance], (0, 0, distance, 0))
        if seq_idx_BS is not None:
            same_BS = seq_idx_BS[:, distance:] == seq_idx_BS[:, :-distance]
            same_BS = F.pad(same_BS, (distance, 0))
            earlier_BSC = earlier_BSC.where(same_BS[..., None], earlier_BSC.new_zeros(()))
        y_BSC = torch.addcmul(y_BSC, earlier_BSC, weight_CK[:, -1 - distance])
    return F.silu(y_BSC)


def causal_conv1d_step(
    x_BC: Tensor, state_BCJ: Tensor, weight_CK: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    window_BCK = torch.cat((state_BCJ, x_BC[..., None].to(state_BCJ.dtype)), dim=-1)
    y_BC = (window_BCK * weight_CK.to(window_BCK.dtype)).sum(-1) + bias_C.to(window_BCK.dtype)
    return F.silu(y_BC).to(x_BC.dtype), window_BCK[..., 1:]


def conv_state(x_BSC: Tensor, kernel: int) -> Tensor:
    keep = kernel - 1
    last_BJC = x_BSC[:, max(0, x_BSC.shape[1] - keep) :]
    return F.pad(last_BJC, (0, 0, keep - last_BJC.shape[1], 0)).transpose(1, 2).contiguous()
