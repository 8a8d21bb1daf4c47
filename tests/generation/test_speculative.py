"""Drafts change no text at temperature 0, and no distribution above it."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product, zip_longest
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.generated import Texts, full_pass, requests_of, texts
from helpers.tiny_models import CHUNK, CONV, loud_model, smallest_routing_margin, tiny_config
from nemo_hybrid.generation import batched, speculative
from nemo_hybrid.generation.batched import Generator, Request, Rollout
from nemo_hybrid.generation.sampling import stream
from nemo_hybrid.generation.speculative import Speculation, accepts, remainder
from nemo_hybrid.generation.thinking import Markers
from nemo_hybrid.model import attention
from nemo_hybrid.model.cache import After, Caches
from nemo_hybrid.model.hybrid import HybridLM

SEED, CLOSE, RIGHT = 4, 1e-5, 0.7
LENGTHS = [1, CONV - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
STOPS = frozenset({7, 34})
MARKERS = Markers((50,), (51, 52))
MANY, FEW = 200, 16


@cache
def model() -> HybridLM:
    config = tiny_config("ME*-ME", mtp_num_depths=1, mtp_pattern="*E")
    return loud_model(config).requires_grad_(False)


def requests(count: int = MANY) -> list[Request]:
    """Half of them stop; some think, three in four within a budget."""
    plain = requests_of(count, LENGTHS, [1, 16, 32], STOPS, seed=2)
    return [
        replace(request, budget=[None, 0, 2, 7][number % 4], thinks=number % 3 == 0)
        for number, request in enumerate(plain)
    ]


def rollouts(
    drafts: int, slots: int = 64, temperature: float = 0.0, count: int = MANY
) -> list[Rollout]:
    generator = Generator(
        model(), slots, temperature=temperature, seed=SEED, drafts=drafts, markers=MARKERS
    )
    return list(generator.run(requests(count)))


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


def compare(found: Texts) -> None:
    """With texts without drafts, up to near ties: where one of the two best logits leads by less
    than CLOSE, or one of the choices of experts before does, rounding may decide. What follows is
    not compared, and must be next to nothing."""
    exact, by_number = deepcopy(model()).double(), {r.prompt: r for r in requests()}
    compared = left_out = 0
    for (number, sample), (ids, ended) in found.items():
        wanted = plain()[number, sample]
        compared += len(wanted[0])
        if (ids, ended) != wanted:
            both = zip_longest(ids, wanted[0])
            same = next(place for place, (a, b) in enumerate(both) if a != b)
            prompt = list(by_number[number].ids)
            text = torch.tensor([prompt + wanted[0][:same]])
            best_2 = exact(text).logits[0, -1].topk(2).values
            lead = min(float(best_2[0] - best_2[1]), smallest_routing_margin(exact, text))
            assert lead < CLOSE, (number, same, lead)
            left_out += len(wanted[0]) - same
    assert left_out <= compared / 1000


def test_the_prompts_test_something() -> None:
    by_number = {r.prompt: r for r in requests()}
    assert {ended for _, ended in plain().values()} == {"stop", "length"}
    assert sum(len(ids) for ids, _ in plain().values()) > 10 * MANY
    forced = [r for r in rollouts(0) if not all(r.chosen)]
    assert len(forced) > MANY / 8
    assert any(r.ended == "stop" and len(r.ids) > 3 for r in forced)
    assert {by_number[r.request.prompt].budget for r in forced} == {0, 2, 7}


@pytest.mark.parametrize(("drafts", "slots"), [(1, 64), (3, 32), (7, 64)])
def test_greedy_texts_of_many_prompts_are_those_without_drafts(drafts: int, slots: int) -> None:
    """With good drafts: markers that are forced and tokens that end texts stand among them."""
    with patch.object(Speculation, "_draft", parrot):
        found = rollouts(drafts, slots)
    assert len(found) == MANY
    compare(texts(found))
    passes = [count for rollout in found for count in rollout.passes]
    assert {1, drafts + 1} <= {*passes}
    assert all(1 + sum(r.passes) == len(r.ids) for r in found)
    assert sum(passes) / len(passes) > 1 + drafts * RIGHT**drafts / 2


@pytest.mark.parametrize(("drafts", "slots"), [(1, 4), (3, 2), (7, 64)])
def test_greedy_texts_are_those_without_drafts(drafts: int, slots: int) -> None:
    """With the drafts of the MTP block, which in this model are few that stay."""
    compare(texts(rollouts(drafts, slots, count=FEW)))


def with_states_of_all_drafts() -> object:
    """Fewer tokens count, but states stay what they are after all drafts."""

    def forgetful(self: HybridLM, after: After, counts_B: Tensor, caches: Caches) -> After:
        return after._replace(counts_B=counts_B)

    return patch.object(HybridLM, "revise", forgetful)


def without_lengths() -> object:
    """Attention looks at what stands behind a row's length too: drafts that did not stay."""

    def broken(q_BSHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, before_B: Tensor) -> Tensor:
        return REAL_ATTENTION(q_BSHP, k_BTGP, v_BTGP, before_B + k_BTGP.shape[1])

    return patch.object(attention, "attention_read", broken)


@pytest.mark.parametrize("sabotage", [with_states_of_all_drafts, without_lengths])
def test_the_comparison_notices(sabotage: Callable[[], AbstractContextManager[None]]) -> None:
    with patch.object(Speculation, "_draft", parrot), sabotage():
        found = texts(rollouts(3, slots=8, count=FEW))
    with pytest.raises(AssertionError):
        compare(found)
    long = [key for key in found if len(plain()[key][0]) > 9]
    assert sum(found[key] != plain()[key] for key in long) > len(long) / 2


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
        (rollout,) = Generator(model(), 1, seed=SEED, drafts=1, markers=MARKERS).run([request])
    text = torch.tensor([[*request.ids, *rollout.ids]])
    h_BSD, _ = model().forward_hidden(text)
    (u_BSD, *_), _ = model().forward_mtp(h_BSD, text)
    best = model().logits(u_BSD)[0].argmax(-1).tolist()
    assert len(drafted) > 5
    # After place p, the token there is read with the state of the one before it.
    start = len(request.ids) - 2
    assert drafted == {place: best[start + place] for place in drafted}


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: how many tokens the experts see."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.__name__.startswith("nonzero")
        return func(*args, **(kwargs or {}))


def test_a_round_waits_for_a_gpu_once() -> None:
    """To know how many tokens stayed in the last one, whatever the number of drafts."""
    counts = []

    def watched(self: Speculation, *words: object) -> object:
        with Waits() as waits:
            found = REAL_ROUND(self, *words)
        counts.append(waits.count)
        return found

    with patch.object(Speculation, "round", watched):
        rollouts(5, slots=4, count=4)
    assert set(counts) == {1}


def drawn(slots: int, drafts: int = 3) -> Texts:
    """Two samples of each of a few prompts."""
    generator = Generator(model(), slots, temperature=1.0, seed=SEED, drafts=drafts)
    some = requests_of(8, LENGTHS, [1, 9, 17], STOPS, samples=range(2))
    return texts(generator.run(some))


@pytest.mark.parametrize("slots", [3, 64])
def test_drawn_texts_do_not_depend_on_slots(slots: int) -> None:
    assert drawn(slots) == drawn(1)


def test_drawn_texts_are_those_of_their_numbers() -> None:
    found = drawn(64)
    assert found != drawn(64, drafts=0)
    assert sum(found[n, 0] != found[n, 1] for n in range(8)) > 4
    with patch.object(batched, "stream", lambda seed, prompt, sample: stream(seed, prompt, 0)):
        broken = drawn(64)
    assert all(broken[n, 0] == broken[n, 1] == found[n, 0] for n in range(8))


@pytest.mark.parametrize("drafts", [0, 3])
def test_log_probabilities_are_the_models_own_whatever_is_drawn(drafts: int) -> None:
    """Against the full pass in fp64; not those of the distribution that is drawn from."""
    exact = deepcopy(model()).double()
    generator = Generator(
        model(), 4, temperature=0.7, top_p=0.9, seed=SEED, drafts=drafts, markers=MARKERS
    )
    off = {1.0: 0.0, 0.7: 0.0}
    for rollout in generator.run(requests(FEW)):
        logits_nV, ids_n1 = full_pass(exact, rollout), torch.tensor(rollout.ids)[:, None]
        found_n1 = torch.tensor(rollout.logprobs)[:, None]
        for temperature in off:
            own_n1 = (logits_nV / temperature).log_softmax(-1).gather(-1, ids_n1)
            apart = float((found_n1 - own_n1).abs().max())
            off[temperature] = max(off[temperature], apart)
    assert off[1.0] < 1e-4
    assert off[0.7] > 0.1


# -- The distribution

N, PROMPT, SYMBOLS = 4000, [1, 3, 2, 0, 1], 4


@cache
def small() -> HybridLM:
    config = tiny_config("M*", vocab_size=SYMBOLS, mtp_num_depths=1, mtp_pattern="*")
    return loud_model(config).requires_grad_(False)


def expected(temperature: float, top_p: float) -> Tensor:
    """Probability of every text of three tokens after PROMPT."""
    joint = torch.ones(SYMBOLS, SYMBOLS, SYMBOLS, dtype=torch.float64)
    every = torch.tensor(list(product(range(SYMBOLS), repeat=3)))
    with torch.no_grad():
        logits = small()(torch.cat([torch.tensor([PROMPT] * len(every)), every], 1)).logits
    p_B3V = (logits[:, len(PROMPT) - 1 : -1].double() / temperature).softmax(-1)
    # A token counts if those that are more probable have less than top_p together.
    larger_B3VV = p_B3V[..., None, :] > p_B3V[..., None]
    p_B3V = p_B3V * ((larger_B3VV * p_B3V[..., None, :]).sum(-1) < top_p)
    p_B3V /= p_B3V.sum(-1, keepdim=True)
    joint[tuple(every.T)] = p_B3V.gather(-1, every[..., None])[..., 0].prod(1)
    return joint


def surprise(drafts: int, temperature: float, top_p: float = 1.0) -> tuple[float, float]:
    """Chi-squared of N drawn texts, over its degrees of freedom, and the mean of a pass. It is
    infinite if texts were drawn that have no probability."""
    request = Request(0, PROMPT, 3, range(N))
    generator = Generator(
        small(), 1000, temperature=temperature, top_p=top_p, seed=SEED, drafts=drafts
    )
    found = list(generator.run([request]))
    counts = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS, dtype=torch.float64)
    for rollout in found:
        counts[tuple(rollout.ids)] += 1
    wanted = expected(temperature, top_p) * N
    passes = [count for rollout in found for count in rollout.passes]
    can = wanted > 0
    chi = float(((counts - wanted).square() / wanted)[can].sum()) / (int(can.sum()) - 1)
    chi = float("inf") if counts[~can].any() else chi
    return chi, sum(passes) / max(1, len(passes))


LIKELY = 1.6
"""Chi-squared of 63 degrees of freedom lies above 1.6 times that number once in 1000 draws, of 28
once in 40; the draws here are always the same ones."""


@pytest.mark.parametrize(
    ("drafts", "temperature", "top_p"),
    [(0, 1.0, 1.0), (1, 1.0, 1.0), (2, 1.0, 1.0), (2, 0.6, 1.0), (2, 1.4, 0.8)],
)
def test_drawn_texts_have_the_models_distribution(
    drafts: int, temperature: float, top_p: float
) -> None:
    chi, tokens = surprise(drafts, temperature, top_p)
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


REAL_DRAFT, REAL_ROUND, REAL_ACCEPTS = Speculation._draft, Speculation.round, accepts
REAL_ATTENTION = attention.attention_read
