"""Drafts change no text at temperature 0, and no distribution above it."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.generated import Texts, requests_of, texts
from helpers.tiny_models import CHUNK, CONV, loud_model, smallest_routing_margin, tiny_config
from nemo_hybrid.generation import speculative
from nemo_hybrid.generation.batched import Generator, Request, Rollout
from nemo_hybrid.generation.sampling import stream
from nemo_hybrid.generation.speculative import Speculation, accepts, remainder
from nemo_hybrid.model.cache import After, Caches
from nemo_hybrid.model.hybrid import HybridLM

SEED, CLOSE, RIGHT = 4, 1e-5, 0.7
LENGTHS = [1, CONV - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
STOPS = frozenset({7, 34})


@cache
def model() -> HybridLM:
    config = tiny_config("ME*-ME", mtp_num_depths=1, mtp_pattern="*E")
    return loud_model(config).requires_grad_(False)


def requests() -> list[Request]:
    return requests_of(10, LENGTHS, [1, 20, 25, 33], STOPS, seed=2)


def rollouts(drafts: int, slots: int = 4, temperature: float = 0.0) -> list[Rollout]:
    generator = Generator(model(), slots, temperature=temperature, seed=SEED, drafts=drafts)
    return list(generator.run(requests()))


@cache
def plain() -> Texts:
    return texts(rollouts(0))


def parrot(
    self: Speculation, u_BD: Tensor, caches: Caches, streams_B: Tensor, places_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Drafts of which most are what the text without drafts goes on with."""
    known = {stream(SEED, *key): ids for key, (ids, _) in plain().items()}
    draw, drafts = random.Random(int(places_B.sum())), []
    for one, place in zip(streams_B.tolist(), places_B.tolist(), strict=True):
        ahead = [*known.get(one, []), *[1] * 99][place : place + self.drafts]
        drafts.append([t if draw.random() < RIGHT else draw.randrange(1, 60) for t in ahead])
    return torch.tensor(drafts), torch.zeros(0)


def test_texts_without_drafts_are_clear() -> None:
    """No best token leads the next by so little, nor any choice of experts, that rounding decides:
    only then have they to be equal."""
    exact = loud_model(model().config).double()
    for request in requests():
        ids, _ = plain()[request.prompt, 0]
        text = torch.tensor([[*request.ids, *ids]])
        best_S2 = exact(text).logits[0, len(request.ids) - 1 : -1].topk(2).values
        assert (best_S2[:, 0] - best_S2[:, 1]).min() > CLOSE
        assert smallest_routing_margin(exact, text) > CLOSE
    assert {ended for _, ended in plain().values()} == {"stop", "length"}
    assert sum(len(ids) for ids, _ in plain().values()) > 80


@pytest.mark.parametrize(("drafts", "slots"), [(1, 4), (3, 1), (3, 4), (7, 64)])
def test_greedy_texts_are_those_without_drafts(drafts: int, slots: int) -> None:
    assert texts(rollouts(drafts, slots)) == plain()
    with patch.object(Speculation, "_draft", parrot):
        found = rollouts(drafts, slots)
    assert texts(found) == plain()
    passes = [count for rollout in found for count in rollout.passes]
    assert {1, drafts + 1} <= {*passes}
    assert all(1 + sum(r.passes) == len(r.ids) for r in found)
    assert sum(passes) / len(passes) > 1 + drafts * RIGHT**drafts / 2


def test_the_comparison_notices_a_state_that_is_not_taken_back() -> None:
    last: list[After] = []

    def forgetful(
        self: HybridLM, ids_BS: Tensor, counts_B: Tensor, caches: Caches
    ) -> tuple[Tensor, After]:
        h_BSD, after = REAL_READ(self, ids_BS, counts_B, caches)
        if ids_BS.shape[1] == 4 and not (counts_B == 4).all() and last:
            return h_BSD, after._replace(states=last[-1].states)
        last.append(after)
        return h_BSD, after

    with patch.object(Speculation, "_draft", parrot), patch.object(HybridLM, "read", forgetful):
        found = texts(rollouts(3, slots=1))
    long = [key for key, (ids, _) in plain().items() if len(ids) > 9]
    assert len(long) >= 3
    assert all(found[key] != plain()[key] for key in long)


def test_the_first_draft_is_that_of_the_full_pass_of_the_mtp_block() -> None:
    """After every verified token, whatever was drafted and forgotten before."""
    drafted: dict[int, int] = {}

    def watched(
        self: Speculation, u_BD: Tensor, caches: Caches, streams_B: Tensor, places_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        drafts_BK, q_BKV = REAL_DRAFT(self, u_BD, caches, streams_B, places_B)
        drafted[int(places_B)] = int(drafts_BK)
        return (drafts_BK, q_BKV) if int(places_B) % 3 else parrot(
            self, u_BD, caches, streams_B, places_B
        )  # fmt: skip

    request = max(requests(), key=lambda request: len(plain()[request.prompt, 0][0]))
    with patch.object(Speculation, "_draft", watched):
        (rollout,) = Generator(model(), 1, seed=SEED, drafts=1).run([request])
    text = torch.tensor([[*request.ids, *rollout.ids]])
    h_BSD, _ = model().forward_hidden(text)
    (u_BSD, *_), _ = model().forward_mtp(h_BSD, text)
    best = model().logits(u_BSD)[0].argmax(-1).tolist()
    assert len(drafted) > 5
    # After place p, the token there is read with the state of the one before it.
    start = len(request.ids) - 2
    assert drafted == {place: best[start + place] for place in drafted}


@pytest.mark.parametrize("slots", [3, 64])
def test_drawn_texts_do_not_depend_on_slots(slots: int) -> None:
    one, many = (texts(rollouts(3, n, temperature=1.0)) for n in (1, slots))
    assert one == many
    assert one != texts(rollouts(0, 1, temperature=1.0))


# -- The distribution

N, PROMPT, SYMBOLS = 4000, [1, 3, 2, 0, 1], 4


@cache
def small() -> HybridLM:
    config = tiny_config("M*", vocab_size=SYMBOLS, mtp_num_depths=1, mtp_pattern="*")
    return loud_model(config).requires_grad_(False)


def expected(temperature: float) -> Tensor:
    """Probability of every text of three tokens after PROMPT."""
    joint = torch.ones(SYMBOLS, SYMBOLS, SYMBOLS, dtype=torch.float64)
    every = torch.tensor(list(product(range(SYMBOLS), repeat=3)))
    with torch.no_grad():
        logits = small()(torch.cat([torch.tensor([PROMPT] * len(every)), every], 1)).logits
    p_B3V = (logits[:, len(PROMPT) - 1 : -1].double() / temperature).softmax(-1)
    joint[tuple(every.T)] = p_B3V.gather(-1, every[..., None])[..., 0].prod(1)
    return joint


def surprise(drafts: int, temperature: float) -> tuple[float, float]:
    """Chi-squared of N drawn texts, over its degrees of freedom; and the mean of a pass."""
    request = Request(0, PROMPT, 3, range(N))
    generator = Generator(small(), 1000, temperature=temperature, seed=SEED, drafts=drafts)
    found = list(generator.run([request]))
    counts = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS, dtype=torch.float64)
    for rollout in found:
        counts[tuple(rollout.ids)] += 1
    wanted = expected(temperature) * N
    passes = [count for rollout in found for count in rollout.passes]
    chi = float(((counts - wanted).square() / wanted).sum()) / (SYMBOLS**3 - 1)
    return chi, sum(passes) / max(1, len(passes))


LIKELY = 1.6
"""Chi-squared of 63 degrees of freedom lies above 1.6 times that number once in 1000 draws; the
draws here are always the same ones."""


@pytest.mark.parametrize(("drafts", "temperature"), [(0, 1.0), (1, 1.0), (2, 1.0), (2, 0.6)])
def test_drawn_texts_have_the_models_distribution(drafts: int, temperature: float) -> None:
    chi, tokens = surprise(drafts, temperature)
    assert chi < LIKELY
    assert tokens > 1.2 or not drafts


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("accepts", lambda p, q, drafts, numbers: REAL_ACCEPTS(q, p, drafts, numbers)),
        ("accepts", lambda p, q, drafts, numbers: numbers < 2),
        ("remainder", lambda p, q: p),
    ],
)
def test_the_distribution_notices(name: str, broken: Callable[..., Tensor]) -> None:
    with patch.object(speculative, name, broken):
        assert surprise(2, 1.0)[0] > 3 * LIKELY


def test_acceptance_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same distributions and random numbers; what follows is drawn from the same."""
    from transformers.generation import utils

    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        q_1KV, p_1SV = (torch.randn(1, n, 6, generator=draw) for n in (4, 5))
        drafts_1K = torch.multinomial(q_1KV[0].softmax(-1), 1, generator=draw).T
        numbers_1K = torch.rand(1, 4, generator=draw)
        drawn_from: list[Tensor] = []

        def remembered(p: Tensor, num_samples: int, into: list[Tensor] = drawn_from) -> Tensor:
            into.append(p)
            return torch.zeros(1, num_samples, dtype=torch.int64)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand_like", lambda _, numbers=numbers_1K: numbers)
            patched.setattr(torch, "multinomial", remembered)
            _, count = utils._speculative_sampling(drafts_1K, q_1KV, 4, p_1SV)
        p, q = p_1SV.softmax(-1), q_1KV.softmax(-1)
        stays_1K = accepts(p[:, :-1], q, drafts_1K, numbers_1K)
        accepted = int(stays_1K.long().cumprod(1).sum())
        assert accepted == int(count)
        ahead = torch.cat([q, torch.zeros_like(p[:, :1])], 1)
        rest_1V = remainder(p[:, accepted], ahead[:, accepted])
        torch.testing.assert_close(
            rest_1V / rest_1V.sum(), drawn_from[0].view(1, -1) / drawn_from[0].sum()
        )
        seen.add(accepted)
    assert seen == {0, 1, 2, 3, 4}


def test_where_nothing_is_left_p_is_drawn_from() -> None:
    p_BV = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    assert torch.equal(remainder(p_BV, p_BV), p_BV)


REAL_READ, REAL_DRAFT, REAL_ACCEPTS = HybridLM.read, Speculation._draft, accepts
