"""RMSNorm, plain and gated by groups. Maths in fp32, result in x's dtype.

Shapes: the last dimension is normalised (D); everything before it is batch.
"""

from __future__ import annotations

from torch import Tensor

from nemo_kernels import backend

PATHS: dict[str, str] = {}


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; shape and dtype of x."""
    return backend.implementation("norm", x.device.type).rms_norm(x, weight_D, eps)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, group_size: int
) -> Tensor:
    """RMSNorm of x * SiLU(gate), each group of group_size channels by itself, times weight.

    The gate comes before the norm, as in the Mamba-2 mixer of Nemotron-H. Shape and dtype of x.
    """
    impl = backend.implementation("norm", x.device.type)
    return impl.gated_rms_norm(x, gate, weight_D, eps, group_size)
