"""Mamba states in fp16: every rounding, what many of them add up to, and that a sample's rounding
depends on nothing but the sample."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.tiny_models import CHUNK, loud_model, random_ids, tiny_config
from nemo_hybrid.generation import batched
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.model import cache as cache_module
from nemo_hybrid.model.cache import (
    Fp16MambaCache,
    StateFormat,
    commit,
    copy_rows,
    draw_from,
    keep_states,
)
from nemo_hybrid.model.hybrid import HybridLM
from nemo_kernels.lowp.rounding import fp16_stochastically, fp16_to_nearest

EVERY = torch.arange(2**13, dtype=torch.int16)  # what 13 random bits can be
LARGEST, STEP = 65504.0, 2.0**-24


def numbers() -> Tensor:
    """fp32 numbers of all sizes that fp16 has, subnormal ones, ties and beyond."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(300, generator=draw) * 2.0 ** torch.randint(-28, 16, (300,), generator=draw)
    edges = [0.0, STEP / 3, STEP / 2, STEP, 1.5 * STEP, 2.0**-14 - STEP / 4, 2.0**-14, 1 + 2.0**-11,
             2048.5, 65503.0, LARGEST, 65520.0, 1e30, float("inf")]  # fmt: skip
    return torch.cat([wide, torch.tensor(edges), -torch.tensor(edges)])


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The fp16 numbers around each, by numpy; twice the same where it is one; fp64."""
    exact = x.clamp(-LARGEST, LARGEST).double().numpy()
    near = exact.astype(np.float16)
    with np.errstate(over="ignore"):  # beside the largest, where there is no need of it
        down = np.where(near > exact, np.nextafter(near, np.float16(-np.inf)), near)
        up = np.where(near < exact, np.nextafter(near, np.float16(np.inf)), near)
    return torch.from_numpy(down).double(), torch.from_numpy(up).double()


def test_both_neighbours_come_for_their_share_of_all_random_bits() -> None:
    x = numbers()
    found = fp16_stochastically(x[:, None].expand(-1, 2**13), EVERY.repeat(len(x))).double()
    down, up = (side[:, None] for side in neighbours(x))
    assert ((found == down) | (found == up)).all()
    # The mean over all bits is x, up to the rounding of a subnormal's place in its step.
    error = (found.mean(1) - x.clamp(-LARGEST, LARGEST).double()).abs()
    assert (error <= torch.where(x.abs() < 2.0**-14, STEP * 2.0**-14, 0.0)).all()
    assert ((up - down)[error > 0] == STEP).all()
    low = EVERY.bitwise_or(-(2**13)).repeat(len(x))  # the higher bits do not count
    again = fp16_stochastically(x[:, None].expand(-1, 2**13), low).double()
    assert torch.equal(again, found)


def test_what_fp16_holds_stays_and_what_is_no_number_too() -> None:
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    codes = codes[codes.isfinite()]
    for bits in (0, 1, 2**13 - 1, -1):
        every = torch.full(codes.shape, bits, dtype=torch.int16)
        found = fp16_stochastically(codes.float(), every)
        assert torch.equal(found.view(torch.int16), codes.view(torch.int16))
        assert fp16_stochastically(torch.tensor([float("nan")]), every[:1]).isnan()
    assert torch.equal(fp16_to_nearest(codes.float()).view(torch.int16), codes.view(torch.int16))
    x = numbers()
    right = torch.from_numpy(x.clamp(-LARGEST, LARGEST).double().numpy().astype(np.float16))
    assert torch.equal(fp16_to_nearest(x), right)


# -- What roundings add up to: a state s <- r s, whose steps are smaller than half of fp16's

ROWS, SHAPE, RATE, TOKENS = 16, (2, 3, 8), 1 - 2.0**-13, 2000


def empty(format: StateFormat, rows: int = ROWS) -> Fp16MambaCache:
    """A cache of one layer, its rows of different texts."""
    caches = loud_model(tiny_config("M")).new_caches(rows, 1)
    caches.layers[0].ssm_BHPN = torch.zeros(rows, *SHAPE)
    keep_states(caches, format)
    draw_from(caches, torch.arange(rows) * 2**40 + 17, torch.arange(rows))
    (held,) = caches.layers
    assert isinstance(held, Fp16MambaCache)
    return held


@cache
def decayed(format: StateFormat) -> Tensor:
    """A state of 0.75 everywhere after TOKENS decays, over what it should be."""
    held = empty(format)
    held.ssm_BHPN.fill_(0.75)
    for token in range(TOKENS):
        held.store(held.state() * RATE, torch.full((ROWS,), token))
    return held.ssm_BHPN.double() / (0.75 * RATE**TOKENS)


def off_by_sigmas(drift: Tensor) -> float:
    return float((drift.mean() - 1).abs() / (drift.std() / drift.numel() ** 0.5))


def test_a_decaying_state_decays() -> None:
    drift = decayed("stochastic")
    # A quarter of a step each time, 2^-11 of numbers below 1: a binomial's spread.
    spread = 2.0**-11 * (TOKENS * 3 / 16) ** 0.5
    assert float((drift - 1).abs().max()) < 8 * spread
    assert off_by_sigmas(drift) < 4
    print(f"stochastic: {drift.mean() - 1:+.2e} +- {drift.std() / drift.numel() ** 0.5:.1e}")


def test_to_the_nearest_it_does_not() -> None:
    drift = decayed("nearest")
    print(f"nearest: {drift.mean() - 1:+.2e}")
    assert (drift == RATE**-TOKENS).all()  # it has not moved at all
    assert float(drift.min()) - 1 > 0.2


def test_roundings_are_independent_of_each_other() -> None:
    """Else the mean's error above would not fall with their number: of layers, rows, tokens and
    places. 0.5 is the share of numbers that are rounded up."""
    halves = torch.full((ROWS, *SHAPE), 1 + 2.0**-11)
    ups = []
    for token in range(64):
        held = empty("stochastic")
        held.store(halves, torch.full((ROWS,), token))
        ups.append(held.ssm_BHPN.double() > 1)
    up = torch.stack(ups).double()
    for by in ((0, 2, 3, 4), (1, 2, 3, 4), (0, 1)):
        share = up.mean(by)
        sigma = 0.5 / (up.numel() / share.numel()) ** 0.5
        assert float((share - 0.5).abs().max()) < 4 * sigma


# -- A model

SEED, LEARNT, MORE = 11, 4096, 96


@cache
def slow() -> HybridLM:
    """Whose states remember thousands of tokens, of which each adds little."""
    model = loud_model(tiny_config("MM-", chunk_size=64)).requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("dt_bias"):
            tensor.fill_(-8.5)  # time steps of 2e-4
    return model


@torch.no_grad()
def read_on(format: StateFormat) -> Tensor:
    """Hidden states [B, MORE, D] of a text that says the same over and over: it is read at once,
    and then on, token by token."""
    ids_BS = random_ids(slow().config, 2, 2).repeat(1, LEARNT)
    first, caches = slow().new_caches(2, 1), slow().new_caches(2, 1)
    _, after = slow().read(ids_BS[:, :LEARNT], torch.tensor([LEARNT] * 2), first)
    commit(first, after)
    keep_states(caches, format)
    rows_B = torch.arange(2)
    draw_from(caches, rows_B, rows_B)
    copy_rows(first, rows_B, caches, rows_B)
    found = [slow().decode(ids_BS[:, LEARNT + step], caches) for step in range(MORE)]
    return torch.stack(found, 1)


def test_stochastic_rounding_errs_less_than_rounding_to_the_nearest() -> None:
    """The order that is published for Nemotron 3 Super: fp16 to the nearest costs it accuracy, and
    rounded stochastically none that is seen."""
    exact = read_on("float32").double()
    errors: dict[StateFormat, float] = {}
    for format in ("nearest", "stochastic"):
        last = (read_on(format).double() - exact)[:, MORE // 2 :]
        errors[format] = float(last.norm() / exact[:, MORE // 2 :].norm())
    print(errors)
    assert errors["stochastic"] < 0.6 * errors["nearest"]
    assert errors["nearest"] > 1e-4  # which rounding in fp32 does not come near


# -- What a sample depends on


@cache
def exact_model() -> HybridLM:
    """In fp64: rounding to fp16 is then decided alike in batches of every size."""
    config = tiny_config("ME*M", mtp_num_depths=1, mtp_pattern="*")
    return loud_model(config).double().requires_grad_(False)


def requests() -> list[Request]:
    draw = random.Random(0)
    lengths = [1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
    return [
        Request(n, [draw.randrange(1, 61) for _ in range(length)], 12, (0, 1))
        for n, length in enumerate(lengths)
    ]


def softplus(x: Tensor) -> Tensor:
    """Time steps are fp32 also there; a processor's vectors and what is left over of them round
    differently."""
    return x.double().exp().log1p().to(x.dtype)


def logprobs(slots: int, format: StateFormat, drafts: int = 0) -> dict[tuple[int, int], Tensor]:
    generator = Generator(
        exact_model(), slots, temperature=1.0, seed=SEED, drafts=drafts, states=format
    )
    with patch.object(F, "softplus", softplus):
        return {
            (int(r.request.prompt), r.sample): torch.tensor(r.logprobs, dtype=torch.float64)
            for r in generator.run(requests())
        }


def apart(a: dict[tuple[int, int], Tensor], b: dict[tuple[int, int], Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(
        float((a[key] - b[key]).abs().max()) if len(a[key]) == len(b[key]) else 1.0 for key in a
    )


SAME, OTHER = 1e-10, 1e-5


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_sample_is_rounded_alike_in_any_company(drafts: int) -> None:
    alone = logprobs(1, "stochastic", drafts)
    assert apart(logprobs(3, "stochastic", drafts), alone) < SAME
    assert apart(logprobs(8, "stochastic", drafts), alone) < SAME
    assert apart(logprobs(8, "float32", drafts), alone) > OTHER
    assert apart(logprobs(8, "nearest", drafts), alone) > OTHER


REAL_DRAW, REAL_ROUND = draw_from, cache_module._in_fp16


@pytest.mark.parametrize(
    ("place", "name", "broken"),
    [
        (batched, "draw_from", lambda caches, _, to_N: REAL_DRAW(caches, to_N, to_N)),
        (cache_module, "_in_fp16", lambda ssm, read_B, keys: REAL_ROUND(
            ssm, read_B, keys + torch.arange(len(keys))[:, None])),
    ],
)  # fmt: skip
def test_the_comparison_notices_keys_of_slots(
    place: object, name: str, broken: Callable[..., object]
) -> None:
    with patch.object(place, name, broken):
        assert apart(logprobs(1, "stochastic"), logprobs(8, "stochastic")) > OTHER


def test_states_are_kept_in_half_the_memory_and_have_keys_of_their_own() -> None:
    caches = exact_model().new_caches(2, 5)
    keep_states(caches, "stochastic")
    held = [c for c in caches.layers if isinstance(c, Fp16MambaCache)]
    assert [c.ssm_BHPN.dtype for c in held] == 2 * [torch.float16]
    streams = torch.tensor([5, 6])
    draw_from(caches, streams, torch.arange(2))
    keys = {int(key) for c in held for key in c.keys_BR.flatten()}
    assert len(keys) == 4
    drawn = cache_module.random_words(torch.arange(99)[:, None], streams)
    assert not keys & {int(word) for word in drawn.flatten()}
