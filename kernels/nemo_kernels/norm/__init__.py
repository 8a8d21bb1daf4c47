"""RMSNorm, plain and gated by groups. Maths in fp32, result in x's dtype.

Shapes: the last dimension is normalised (D); everything before it is batch.
"""

from __future__ import annotations

from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.checks import expect, expect_device

PATHS = {"triton": "nemo_kernels.norm.kernel"}


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; shape and dtype of x.

    Raises ValueError: shapes or devices do not fit together.
    """
    expect("weight_D", weight_D, x.shape[-1:])
    expect_device(x, weight_D=weight_D)
    impl = backend.implementation("norm", x.device.type)
    return impl.rms_norm(x, weight_D, eps)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, group_size: int
) -> Tensor:
    """RMSNorm of x * SiLU(gate), each group of group_size channels by itself, times weight.

    The gate comes before the norm, as in the Mamba-2 mixer of Nemotron-H. Shape and dtype of x.
    Raises ValueError: shapes or devices do not fit together.
    """
    expect("gate", gate, x.shape)
    expect("weight_D", weight_D, x.shape[-1:])
    expect_device(x, gate=gate, weight_D=weight_D)
    if group_size <= 0 or x.shape[-1] % group_size:
        expected = f"expected a divisor of {x.shape[-1]} (channels)"
        raise ValueError(f"group_size: {expected}, got {group_size}")
    impl = backend.implementation("norm", x.device.type, x.dtype, group_size)
    return impl.gated_rms_norm(x, gate, weight_D, eps, group_size)
