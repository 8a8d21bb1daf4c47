"""Rounding to E2M1 and E4M3, and SplitMix64: against tables, enumeration or published numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.nvfp4_formula import E2M1, E4M3, nearest
from nemo_kernels.lowp.reference import dequantize, quantize
from nemo_kernels.lowp.rounding import (
    random_bits,
    round_stochastically_,
    round_to_e4m3_,
    round_to_nearest_,
)

MASK = 0xFFFFFFFFFFFFFFFF
ALL_BITS = torch.arange(1 << 16).to(torch.int16)
GRID = torch.tensor([*-E2M1[:0:-1], *E2M1], dtype=torch.float32)


def numbers(largest: float) -> Tensor:
    """All bf16 numbers from 2^-40 to the largest, their halves' neighbours, and the negatives."""
    bits = torch.arange(1 << 15, dtype=torch.int32) << 16
    x = bits.view(torch.float32)
    x = x[(x >= 2.0**-40) & (x <= largest)]
    infinity = torch.tensor(torch.inf)
    x = torch.cat((x, x.nextafter(-infinity), x.nextafter(infinity), torch.zeros(1)))
    return torch.cat((x, -x)).clamp(-largest, largest)


def neighbours(y: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest E2M1 value <= y and the least one >= y."""
    below = GRID[torch.searchsorted(GRID, y, right=True) - 1]
    return below, GRID[torch.searchsorted(GRID, y)]


def python_splitmix(seed: int, i: int) -> int:
    """Word i of the generator with Python's numbers."""
    z = seed + (i + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def test_to_nearest_is_the_nearest_in_the_table() -> None:
    y = numbers(6.0)
    wanted = torch.from_numpy(E2M1[nearest(y.abs().numpy(), E2M1)]).float().copysign(y)
    assert torch.equal(round_to_nearest_(y.clone()), wanted)
    assert round_to_nearest_(torch.full((3,), torch.nan)).isnan().all()


def test_e4m3_is_rounded_as_by_the_cast() -> None:
    ties = torch.from_numpy((E4M3[1:] + E4M3[:-1]) / 2).float()
    s = torch.cat((numbers(448.0), torch.from_numpy(E4M3).float(), ties))
    assert torch.equal(round_to_e4m3_(s.clone()), s.to(torch.float8_e4m3fn).float())
    assert round_to_e4m3_(torch.full((3,), torch.nan)).isnan().all()


def test_the_generator_gives_the_published_words() -> None:
    # Those of the C code of Vigna (prng.di.unimi.it/splitmix64.c) for the state 1234567.
    words = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    bits = random_bits(20, 1234567).view(torch.int64)
    assert [int(w) & MASK for w in bits] == words
    assert [python_splitmix(1234567, i) for i in range(5)] == words


@pytest.mark.parametrize("seed", [0, 77, 0xDEADBEEF12345678, -5])
@pytest.mark.parametrize("start", [0, 64, 1 << 40])
def test_which_bits_serve_which_element(seed: int, start: int) -> None:
    bits = random_bits(32, seed, start=start).tolist()
    for j, got in enumerate(bits):
        word, place = divmod(start + j, 4)
        assert got & 0xFFFF == python_splitmix(seed & MASK, word) >> 16 * place & 0xFFFF


@pytest.mark.parametrize(
    "y", [0.0, 1e-9, 2.0**-17, 0.1, 0.25, 0.7, 1.0, 1.3, 2.75, 4.0, 4.1, 5.9999, 6.0, -0.3, -5.1]
)
def test_all_random_bits_together_round_up_as_often_as_they_should(y: float) -> None:
    value = torch.tensor(y)
    below, above = (float(n) for n in neighbours(value))
    rounded = round_stochastically_(torch.full((1 << 16,), y), ALL_BITS)
    assert set(rounded.tolist()) <= {below, above}
    if below == above:
        return
    step = above - below
    fraction = (float(value) - below) / step
    ups = int((rounded == above).sum())
    assert abs(ups - fraction * 2**16) <= 0.5
    assert abs(float(rounded.double().mean()) - float(value)) <= step * 2**-17


def test_stochastic_rounding_takes_one_of_the_two_neighbours() -> None:
    y = numbers(6.0)
    y = y[: len(y) // 4 * 4]
    below, above = neighbours(y)
    for seed in range(8):
        rounded = round_stochastically_(y.clone(), random_bits(len(y), seed))
        assert ((rounded == below) | (rounded == above)).all()
    assert (rounded != round_to_nearest_(y.clone())).any()
    assert round_stochastically_(torch.full((8,), torch.nan), random_bits(8, 0)).isnan().all()


def test_stochastic_rounding_of_tensors_is_unbiased_and_of_nearest_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    # Blocks of one large and many small values: to nearest, the small ones vanish.
    x = torch.rand(64, 64, generator=generator) * 0.06
    x[:, ::16] = 1.0
    draws = torch.stack([dequantize(quantize(x, seed=seed)) for seed in range(400)]).double()
    error = draws.mean(0) - x.double()
    # Each draw is 0 or the step; rare steps would not give a normal distribution.
    step = 1 / 12
    small = (x > 0.005) & (x < 0.5)
    deviation = (x.double() * (step - x.double()) / len(draws))[small].sqrt()
    scores = error[small] / deviation
    assert float(scores.abs().max()) < 5
    assert 0.95 < float(scores.std()) < 1.05
    # The mean over all values: its standard deviation is about 3e-5.
    assert abs(float(error.mean())) < 1.2e-4
    assert abs(float((dequantize(quantize(x)) - x).mean())) > 4e-3


def test_one_seed_gives_one_result_and_another_seed_another() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    first, again, other = (quantize(x, seed=seed).data for seed in (7, 7, 7 + (1 << 32)))
    assert torch.equal(first, again)
    assert 0.2 < float((first != other).float().mean()) < 0.8


def test_the_place_in_x_decides_and_not_the_size_of_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    layouts = [{}, {"columnwise": True, "rht": True}, {"tile": (16, 16)}]
    whole = [quantize(x, seed=1, **layout) for layout in layouts]
    monkeypatch.setattr("nemo_kernels.lowp.scales._PART", {"cpu": 100})
    parts = [quantize(x, seed=1, **layout) for layout in layouts]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.data, b.data)
        assert torch.equal(a.block_scale.float(), b.block_scale.float())
    # Columnwise, element [row, column] of x has the bits of that place.
    same = torch.full((32, 32), 0.7)
    amax = torch.tensor(2688.0)
    rowwise, columnwise = (
        dequantize(quantize(same, seed=1, columnwise=c, amax=amax)) for c in (False, True)
    )
    assert len(rowwise.unique()) == 2
    assert torch.equal(rowwise, columnwise.mT)


def test_random_bits_are_even_and_without_relations() -> None:
    n = 1 << 20
    bits = random_bits(n, 3).numpy().view(np.uint16).astype(np.float64) / 65536
    limit = 5 / math.sqrt(n)
    assert abs(bits.mean() - 0.5) < limit * math.sqrt(1 / 12)
    centred = (bits - bits.mean()) / bits.std()
    for lag in (1, 2, 3, 4, 8, 16, 1024):
        assert abs((centred[lag:] * centred[:-lag]).mean()) < limit
    for seed in (2, 3 + (1 << 32), 3 ^ (1 << 31), -(1 << 60)):
        other = random_bits(n, seed).numpy().view(np.uint16) / 65536 - 0.5
        assert abs((centred * other).mean()) < limit
    counts = np.bincount((bits * 256).astype(int), minlength=256)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert 255 - 5 * math.sqrt(510) < chi2 < 255 + 5 * math.sqrt(510)
