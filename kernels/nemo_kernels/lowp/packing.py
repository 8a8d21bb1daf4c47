"""Codes of E2M1 and their packing, two in a byte.

A code is 8 * sign + index into 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode(values: Tensor, negative: Tensor) -> Tensor:
    """uint8 codes of fp32 E2M1 values (NaN: that of 6), which are overwritten. The sign comes from
    the bool ``negative`` alone, as rounding loses that of -0."""
    # Doubled magnitudes are 0 1 2 3 4 6 8 12: beyond 4 and again beyond 8, codes rise more slowly.
    double = values.abs_().mul_(2).nan_to_num_(nan=12.0).to(torch.uint8)
    beyond_4 = double.clamp_min(4).sub_(4).bitwise_right_shift_(1)
    beyond_8 = double.clamp_min(8).sub_(8).bitwise_right_shift_(2)
    return double.sub_(beyond_4).sub_(beyond_8).add_(negative, alpha=8)


def decode(codes: Tensor) -> Tensor:
    """fp32 values of uint8 codes 0 to 15."""
    index = codes.to(torch.int32) & 7
    # From 2 on, an index is the exponent (from 2^0) and the top bit of the mantissa of its value.
    bits = (index + ((127 << 1) - 2)) << 22
    values = torch.where(index < 2, index * 0.5, bits.view(torch.float32))
    return torch.where(codes > 7, -values, values)


def decode_packed(data: Tensor) -> Tensor:
    """fp32 values [..., K] of packed codes [..., K/2]."""
    pairs = decode(unpack(torch.arange(256, dtype=torch.uint8, device=data.device)))
    return torch.embedding(pairs.view(256, 2), data.int()).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """uint8 [..., K] to bytes [..., K/2]: the even element's code in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(data: Tensor) -> Tensor:
    """Undoes :func:`pack`."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
