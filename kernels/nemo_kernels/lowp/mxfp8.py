"""MXFP8, emulated: E4M3 elements with a power of two as the scale of each block of 32
(OCP Microscaling Formats v1.0).

The scale is the least power of two with which the block's largest value fits, as on NVIDIA's
hardware and in TransformerEngine (the OCP text rounds it down instead, and large values saturate):

    scale = 2^ceil(log2(amax_b / 448)), from 2^-127 to 2^127
    value = E4M3(x / scale) * scale                                     nearest, ties to even
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kernels.lowp.operand import Operand
from nemo_kernels.lowp.rounding import round_to_e4m3_
from nemo_kernels.lowp.scales import E4M3_MAX, divide, parts

BLOCK = 32
_MANTISSA = (1 << 23) - 1


def operand(x: Tensor, columnwise: bool) -> Operand:
    """x [.., M, N], quantized for products that sum over N, or ``columnwise`` over M.

    Values are bf16, exact where they are 2^-133 at least. A block with NaN or infinity is NaN.

    Raises:
        ValueError: the dimension is not divisible by 32.
    """
    dim = -2 if columnwise else -1
    if x.dim() < 2 or x.shape[dim] % BLOCK:
        raise ValueError(
            f"x: expected [.., M, N] with dimension {dim} divisible by {BLOCK}, got {list(x.shape)}"
        )
    x = x.detach().contiguous()
    after = x.shape[-1] if columnwise else 1
    blocks = x.view(-1, BLOCK, after)
    values = torch.empty_like(blocks, dtype=torch.bfloat16)
    for part in parts(blocks.shape, x.device):
        scale = _scale(_amax(blocks[part].abs()))
        # The inverse of 2^127 is subnormal, but a power of two all the same.
        y = (blocks[part] * scale.reciprocal()).clamp_(-E4M3_MAX, E4M3_MAX)
        values[part] = round_to_e4m3_(y).mul_(scale)
    return Operand(values.view(x.shape), None, columnwise)


def _amax(magnitudes: Tensor) -> Tensor:
    if magnitudes.shape[2] > 1:
        return magnitudes.amax(1, keepdim=True).float()
    # Pooling is the fastest way to reduce short runs.
    return torch.max_pool1d(magnitudes.float().view(1, -1), BLOCK).view(-1, 1, 1)


def _scale(amax: Tensor) -> Tensor:
    """The power of two; NaN where amax is not finite."""
    bits = divide(amax, E4M3_MAX).view(torch.int32)
    exponent = (bits >> 23) + ((bits & _MANTISSA) != 0).int()
    # Below 2^-126 numbers have no exponent of their own; 2^-127 has these bits.
    scale = torch.where(exponent > 0, exponent << 23, 1 << 22).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)
