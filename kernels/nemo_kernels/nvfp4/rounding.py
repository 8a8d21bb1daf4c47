"""Rounding to E2M1, to nearest or stochastically, and the random bits for the latter.

Values are rounded as fp32 numbers, in place; nothing is encoded here. E2M1 holds 0, 0.5, 1, 1.5,
2, 3, 4, 6 and their negatives. Its step at y is half of the power of two below |y|, of 1 at least:
0.5 below 2, 1 below 4, then 2.

Random bits are those of Philox4x32-10 (Salmon et al., SC 2011), ``tl.randint4x(seed, i)`` in
Triton. One call serves 8 elements, 16 bits each. Elements 8i to 8i+7 of a tensor, counted in its
row-major order, have the counter (i mod 2^32, i div 2^32, 0, 0) and the key (seed mod 2^32,
seed div 2^32); element 8i+j takes word j div 2 of the four, of it the low half for even j and the
high half for odd j.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
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


def random_bits(n: int, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """16 random bits for each of the elements start to start + n - 1 of a tensor: int16 [n].

    Which they are is said at the top of this file.

    Args:
        n, start: multiples of 8.
        seed: 64 bits, another one for every tensor.
    """
    calls = torch.arange(start // 8, (start + n) // 8, dtype=torch.int64, device=device)
    zero = torch.zeros_like(calls)
    words = philox((calls & _MASK, calls >> 32, zero, zero), seed)
    bits = torch.empty(n // 8, 2, dtype=torch.int64, device=device)
    torch.bitwise_or(words[0], words[1] << 32, out=bits[:, 0])
    torch.bitwise_or(words[2], words[3] << 32, out=bits[:, 1])
    return bits.view(torch.int16).view(n)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words per counter of four, int64 tensors of one shape."""
    c0, c1, c2, c3 = (word.clone() for word in counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    high = torch.empty_like(c0)
    for _ in range(10):
        # int64 products wrap, so they hold the right 64 bits. Their low words go on as they are,
        # with the high words as junk, and the shift brings in signs: the mask removes both.
        c0.mul_(_MULTIPLIERS[0])
        c2.mul_(_MULTIPLIERS[1])
        torch.bitwise_right_shift(c2, 32, out=high)
        c1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(c0, 32, out=high)
        c3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(_MASK)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _round_to_nearest_(y: Tensor, least_exponent: int, mantissa_bits: int) -> Tensor:
    # Adding 1.5 * 2^n makes the processor round to multiples of 2^(n-23): n such that these are
    # the steps of y's octave.
    up = 23 - mantissa_bits
    magic = _octave(y, least_exponent).add_((up << 23) | (1 << 22)).view(torch.float32)
    return y.add_(magic).sub_(magic)


def _octave(y: Tensor, least_exponent: int) -> Tensor:
    """The bits, as int32, of the power of two below |y|, of 2^least_exponent at least."""
    return y.view(torch.int32).bitwise_and(_EXPONENT).clamp_min_(_ONE + (least_exponent << 23))
