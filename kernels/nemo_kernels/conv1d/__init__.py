"""Causal depthwise convolution with SiLU, as the Mamba-2 mixer uses it.

Shapes: B batch, S sequence, C channels, K kernel width, J = K-1 inputs kept for decoding.
"""

from __future__ import annotations

from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.documents import Documents

PATHS = {
    "triton": "nemo_kernels.conv1d.kernel",
    "causal_conv1d": "nemo_kernels.conv1d.external",
}


def causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Documents | None = None
) -> Tensor:
    """y[b,s,c] = SiLU(bias[c] + sum_k weight[c,k] x[b,s-K+1+k,c]) in x's dtype, [B,S,C].

    Inputs before the sequence count as zero. With documents no tap reaches into another one.
    """
    impl = backend.implementation("conv1d", x_BSC.device.type, x_BSC, weight_CK)
    return impl.causal_conv1d(x_BSC, weight_CK, bias_C, documents)


def causal_conv1d_step(
    x_BC: Tensor, state_BCJ: Tensor, weight_CK: Tensor, bias_C: Tensor
) -> Tensor:
    """One token of :func:`causal_conv1d`: [B,C]. ``state_BCJ``, the J inputs before it, moves on in
    place."""
    impl = backend.implementation("conv1d", x_BC.device.type, x_BC, weight_CK)
    return impl.causal_conv1d_step(x_BC, state_BCJ, weight_CK, bias_C)
