"""Generation in slots: a sample depends on the weights, the seed and its numbers alone.

Texts are compared token for token. Rounding is no part of that: one test shows, by the full
forward pass in fp64, that no random number lies so close to a border between two tokens, and no
token's choice of experts is so close, that rounding in fp32 could decide (found: 1e-6).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.generated import Texts, full_pass, requests_of, texts
from helpers.tiny_models import CHUNK, CONV, loud_model, smallest_routing_margin, tiny_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation import batched
from nemo_hybrid.generation.batched import Generator, Request, Rollout
from nemo_hybrid.generation.sampling import stream, uniforms
from nemo_hybrid.model import layer as layer_module
from nemo_hybrid.model.cache import Caches
from nemo_hybrid.model.hybrid import HybridLM

PATTERN, SEED, CLOSE = "ME*-ME", 11, 2e-5
LENGTHS = [1, CONV - 1, CONV, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2]
STOPS = frozenset({7, 8, 9, 10})


@cache
def model() -> HybridLM:
    return loud_model(tiny_config(PATTERN)).requires_grad_(False)


def requests(samples: Iterable[int] = range(2)) -> list[Request]:
    """Prompts of all lengths, of which some end early, some after one token."""
    return requests_of(2 * len(LENGTHS), LENGTHS, [1, 4, 9, 17], STOPS, samples=samples)


def rollouts(slots: int, some: Iterable[Request] | None = None) -> list[Rollout]:
    generator = Generator(model(), slots, temperature=1.0, seed=SEED)
    return list(generator.run(requests() if some is None else some))


@cache
def some_slots() -> list[Rollout]:
    return rollouts(5)


@cache
def alone() -> Texts:
    """Every sample for itself, one after the other."""
    return texts(rollouts(1))


def test_samples_are_what_the_full_pass_and_their_own_numbers_say() -> None:
    """The oracle: no caches, no slots, fp64; and that no choice is close."""
    exact = deepcopy(model()).double()
    for rollout in some_slots():
        prompt, sample, n = rollout.request.prompt, rollout.sample, len(rollout.ids)
        logits_nV = full_pass(exact, rollout)
        ends_nV = logits_nV.softmax(-1).cumsum(-1)
        numbers_n = uniforms(torch.full((n,), stream(SEED, prompt, sample)), torch.arange(n))
        assert (ends_nV - numbers_n[:, None]).abs().min() > CLOSE
        assert rollout.ids == (ends_nV <= numbers_n[:, None]).sum(-1).tolist()
        text = torch.tensor([[*rollout.request.ids, *rollout.ids]])
        assert smallest_routing_margin(exact, text) > CLOSE
        own_n = logits_nV.log_softmax(-1)[torch.arange(n), torch.tensor(rollout.ids)]
        # Log-probabilities down to -10; their rounding, and that of logits of size 10.
        assert (torch.tensor(rollout.logprobs) - own_n).abs().max() < 1e-4


def test_the_prompts_test_something() -> None:
    found = some_slots()
    assert {r.ended for r in found} == {"stop", "length"}
    stopped = [r for r in found if r.ended == "stop"]
    assert all(r.ids[-1] in STOPS and r.said == r.ids[:-1] for r in stopped)
    assert all(not STOPS & set(r.said) for r in found if r.request.stops)
    assert any(STOPS & set(r.said) for r in found if not r.request.stops)
    assert all(len(r.ids) == r.request.most and r.said == r.ids for r in found if r not in stopped)
    by_prompt = [{tuple(r.ids) for r in found if r.request.prompt == p} for p in range(14)]
    assert sum(len(different) == 2 for different in by_prompt) >= 7


@pytest.mark.parametrize("slots", [3, 8, 64])
def test_the_number_of_slots_does_not_matter(slots: int) -> None:
    assert texts(rollouts(slots)) == alone()


def test_neither_order_nor_company_nor_pieces_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = random.Random(1).sample(requests(), 14)
    assert texts(rollouts(4, shuffled)) == alone()
    few = [Request(r.prompt, r.ids, r.most, (1,), r.stops) for r in shuffled[:5]]
    assert texts(rollouts(2, few)).items() <= alone().items()
    monkeypatch.setattr(batched, "_PIECE", 1)  # prompts are read chunk by chunk
    monkeypatch.setitem(batched._STEPS, "cpu", 5)  # and nobody looks at every token
    assert texts(rollouts(4)) == alone()


def test_a_prompt_is_read_once() -> None:
    read: list[Tensor] = []

    def counting(self: HybridLM, ids_PS: Tensor, counts_P: Tensor, caches: Caches) -> object:
        read.append(counts_P)
        return REAL_READ(self, ids_PS, counts_P, caches)

    some = requests(range(9))[:7]
    with patch.object(HybridLM, "read", counting):
        assert len(rollouts(3, some)) == 63
    assert sum(int(counts_P.sum()) for counts_P in read) == sum(len(r.ids) for r in some)


def test_watching_sees_every_token_in_order() -> None:
    seen: dict[tuple[int, int], list[int]] = {}

    def watch(rollout: Rollout) -> None:
        before = seen.setdefault((rollout.request.prompt, rollout.sample), [])
        assert rollout.ids[: len(before)] == before
        assert len(rollout.ids) > len(before)
        before += rollout.ids[len(before) :]

    found = Generator(model(), 4, temperature=1.0, seed=SEED).run(requests(), watch)
    assert texts(found) == alone()
    assert seen == {key: ids for key, (ids, _) in alone().items()}


def test_nothing_is_asked_nothing_is_given() -> None:
    assert rollouts(4, []) == []
    assert rollouts(4, [Request(0, [1], 5, samples=())]) == []


def test_logits_that_are_no_numbers_are_named() -> None:
    broken = loud_model(tiny_config("M"))
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="logits of new token 1 are not finite"):
        list(Generator(broken, 2).run([Request(0, [1, 2], 3)]))


# -- What must be noticed

REAL_READ, REAL_STREAM, REAL_READING = HybridLM.read, stream, layer_module.reading
REAL_COPY = batched.copy_rows


def without_sample(seed: int, prompt: int, sample: int) -> int:
    return REAL_STREAM(seed, prompt, 0)


def without_mask(*args: object) -> object:
    now = REAL_READING(*args)
    return replace(now, real_BS=torch.ones_like(now.real_BS))


def into_the_next(source: Caches, from_N: Tensor, target: Caches, to_N: Tensor) -> None:
    REAL_COPY(source, from_N, target, (to_N + 1) % len(target.lengths_B))


def lengths_alone(source: Caches, from_N: Tensor, target: Caches, to_N: Tensor) -> None:
    target.lengths_B[to_N] = source.lengths_B[from_N]


@pytest.mark.parametrize(
    ("place", "name", "broken"),
    [
        (batched, "stream", without_sample),
        (layer_module, "reading", without_mask),
        (batched, "copy_rows", into_the_next),
        (batched, "copy_rows", lengths_alone),
    ],
)
def test_the_comparison_notices(place: object, name: str, broken: object) -> None:
    with patch.object(place, name, broken):
        assert texts(rollouts(8)) != alone()
