"""Codes of E2M1 and their packing, two in a byte.

A code is 8 * sign + index into 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kernels.lowp.rounding import rounding_terms

_FIRST_OCTAVE = 127 << 1
"""Twice the exponent, as fp32 holds it, of numbers from 1 to 2."""


def encode(y: Tensor, signs: Tensor) -> Tensor:
    """uint8 codes of fp32 numbers in [-6, 6], none of them NaN, rounded to nearest, ties to the
    even code. Their signs are those of ``signs``, fp32 as well: a -0 there counts."""
    sign = signs.view(torch.int32).bitwise_right_shift(28).bitwise_and_(8)
    size = y.abs()
    octave, magic = rounding_terms(size)
    # The last bits of the sum count steps of the octave: 0 to 4 below 2, where they are the code,
    # and 2 to 4 in each octave above, whose codes are 2 and 4 higher.
    code = size.add_(magic.view(torch.float32)).view(torch.int32).sub_(magic)
    code.add_(octave.bitwise_right_shift_(22)).add_(sign).sub_(_FIRST_OCTAVE)
    return code.to(torch.uint8)


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
    if not codes.numel():
        return codes.new_empty(*codes.shape[:-1], codes.shape[-1] // 2)
    pairs = codes.contiguous().view(torch.int16)  # the even element is the low byte
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def unpack(data: Tensor) -> Tensor:
    """Undoes :func:`pack`."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
