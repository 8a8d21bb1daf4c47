"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor, nn

from nemo_kernels.norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension, computed in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm of x * silu(gate), over groups of ``group_size`` channels: gate first, then norm."""

    def __init__(self, size: int, eps: float, group_size: int) -> None:
        super().__init__(size, eps)
        self.group_size = group_size

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, self.eps, self.group_size)
