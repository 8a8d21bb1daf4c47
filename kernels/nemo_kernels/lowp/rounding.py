"""Rounding to E2M1 and to fp16, to nearest or stochastically, and the random bits for the latter.

Values are rounded as fp32 numbers, in place; nothing is encoded here. E2M1 holds 0, 0.5, 1, 1.5,
2, 3, 4, 6 and their negatives. Its step at y is half of the power of two below |y|, of 1 at least:
0.5 below 2, 1 below 4, then 2.

Random bits are those of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which counts and mixes:
word i, i from 0, is mix(seed + (i + 1) * 0x9E3779B97F4A7C15) modulo 2^64. Elements 4i to 4i+3 of a
tensor, counted in its row-major order, share word i: element 4i+j has its bits 16j to 16j+15. Each
tensor needs a seed of its own that was drawn from all 2^64, such as a hash: of tensors of n
elements whose seeds differ by fewer than n/4 times that constant, one repeats bits of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
FP16_MAX = 65504.0
_FP16_BELOW = (1 << 13) - 1
"""The bits of an fp32 number below those that fp16 keeps, from its smallest normal number on."""
_FP16_NORMAL = 2.0**-14
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_EXPONENT = 0x7F800000
_ONE = 127 << 23  # the bits of 1.0
# Less the bits of 2^n: those of 2^(1-n), one over the step of E2M1.
_TO_INVERSE_STEP = 255 << 23


def round_to_nearest_(y: Tensor) -> Tensor:
    """y, contiguous fp32 in [-6, 6], rounded in place to E2M1 values, ties to the even code.

    NaN stays NaN; a negative value that becomes zero becomes +0.
    """
    return _round_to_nearest_(y, least_exponent=0, mantissa_bits=1)


def round_to_e4m3_(s: Tensor) -> Tensor:
    """s, contiguous fp32 in [-448, 448], rounded in place as a cast to float8_e4m3fn would."""
    return _round_to_nearest_(s, least_exponent=-6, mantissa_bits=3)


def round_stochastically_(y: Tensor, bits: Tensor) -> Tensor:
    """y, contiguous fp32 in [-6, 6], rounded in place to one of its two neighbours in E2M1.

    Let p be y over its step, rounded to a multiple of 2^-16 (to the nearest, ties to even), and b
    the element's bits as a signed number. The result is floor(p + 1/2 + b 2^-16) steps, computed
    without rounding: the upper neighbour for 2^16 (p - floor(p)) of the 2^16 values of b, exactly.
    So the mean differs from y by the rounding of p alone, at most 2^-17 steps. NaN stays NaN.

    Args:
        bits: int16, as many as y has elements; see :func:`random_bits`.
    """
    octave = _octave(y, 0)
    y.mul_((_TO_INVERSE_STEP - octave).view(torch.float32))
    y.add_(192.0).sub_(191.5)  # the last place of numbers around 192 is 2^-16
    y.add_(bits.view(y.shape), alpha=2.0**-16).floor_()
    return y.mul_(octave.view(torch.float32)).mul_(0.5)


def fp16_to_nearest(x: Tensor) -> Tensor:
    """x (fp32) in fp16, to the nearest, ties to even; what is beyond fp16 becomes its largest."""
    return x.clamp(-FP16_MAX, FP16_MAX).half()


def fp16_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """x (fp32) in fp16, as one of its two neighbours there; what is beyond becomes the largest.

    13 random bits are added below the last bit that fp16 keeps, and what then stands there is cut
    off: the neighbour further from 0 comes for a share of the 2^13 values of the bits that is x's
    distance from the other one, in steps. Below 2^-14, where fp16 has one step, x is first rounded
    to 2^-13 of that. NaN stays NaN.

    Args:
        bits: int16, as many as x has elements, of which the lower 13 count (:func:`random_bits`).
    """
    size = x.abs().clamp_(max=FP16_MAX)
    # In the octave from 2^-14 on an fp32 number has its last bit 2^-13 steps of fp16's subnormals.
    shift = (size < _FP16_NORMAL) * _FP16_NORMAL
    code = size.add_(shift).view(torch.int32)
    code.add_(bits.view(x.shape).bitwise_and(_FP16_BELOW)).bitwise_and_(~_FP16_BELOW)
    return code.view(torch.float32).sub_(shift).copysign_(x).half()


def random_bits(n: int, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """16 random bits for each of the elements start to start + n - 1 of a tensor: int16 [n].

    Which they are is said at the top of this file.

    Args:
        n, start: multiples of 4.
        seed: 64 bits, signed or not; another one for every tensor.
    """
    word = torch.arange(start // 4, (start + n) // 4, dtype=torch.int64, device=device)
    return random_words(word, seed).view(torch.int16)


def random_words(i: Tensor, seed: int | Tensor) -> Tensor:
    """Word ``i`` (int64, any shape, from 0) of the generator of each seed: 64 random bits, int64.

    Args:
        seed: 64 bits, a signed or unsigned number, or int64 that is broadcast with ``i``.
    """
    z = (i + 1).mul_(_signed(_GAMMA))  # int64 wraps around
    z = z + seed if isinstance(seed, Tensor) else z.add_(_signed(seed))
    high = torch.empty_like(z)
    for shift, factor in _MIX:
        z.bitwise_xor_(_shifted(z, shift, high)).mul_(_signed(factor))
    return z.bitwise_xor_(_shifted(z, 31, high))


def _shifted(z: Tensor, places: int, out: Tensor) -> Tensor:
    # The shift brings in signs; the mask removes them.
    torch.bitwise_right_shift(z, places, out=out)
    return out.bitwise_and_((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    """The int64 number with the same bits modulo 2^64."""
    return (word + 2**63) % 2**64 - 2**63


def rounding_terms(
    y: Tensor, least_exponent: int = 0, mantissa_bits: int = 1
) -> tuple[Tensor, Tensor]:
    """The bits, as int32, of each number's octave and of 1.5 * 2^n: added to it, the latter makes
    the processor round to multiples of 2^(n-23), which are the steps of the octave. By default of
    E2M1."""
    octave = _octave(y, least_exponent)
    return octave, octave + ((23 - mantissa_bits << 23) | (1 << 22))


def _round_to_nearest_(y: Tensor, least_exponent: int, mantissa_bits: int) -> Tensor:
    magic = rounding_terms(y, least_exponent, mantissa_bits)[1].view(torch.float32)
    return y.add_(magic).sub_(magic)


def _octave(y: Tensor, least_exponent: int) -> Tensor:
    """The bits, as int32, of the power of two below |y|, of 2^least_exponent at least."""
    return y.view(torch.int32).bitwise_and(_EXPONENT).clamp_min_(_ONE + (least_exponent << 23))
