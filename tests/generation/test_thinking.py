"""Budgets of thinking, against a search of the whole text for markers before every token."""

from __future__ import annotations

import random
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.generated import full_pass, requests_of, texts
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation import thinking
from nemo_hybrid.generation.batched import Generator, Request, Rollout
from nemo_hybrid.generation.sampling import stream, uniforms
from nemo_hybrid.generation.thinking import FREE, Markers, Thinking
from nemo_hybrid.model.hybrid import HybridLM

SEED, SYMBOLS, STOP = 6, 7, 6
BUDGETS = [0, 1, 3, None, 8, 30]
MARKERS = {
    "of one token": Markers((2,), (3,)),
    "of several": Markers((2, 3), (3, 4)),
    "that overlap with themselves": Markers((2, 2, 3), (3, 3, 4)),
}


@cache
def model() -> HybridLM:
    config = tiny_config("ME*", vocab_size=SYMBOLS, mtp_num_depths=1, mtp_pattern="*")
    return loud_model(config, seed=2).requires_grad_(False)


def requests(samples: int = 2) -> list[Request]:
    """With all budgets, whether or not their prompts end in thinking; some with less room."""
    plain = requests_of(
        24, lengths=[1, 4, 9], most=[2, 24, 40], stops={STOP}, vocabulary=SYMBOLS, seed=3
    )
    return [
        Request(r.prompt, r.ids, r.most, range(samples), r.stops, BUDGETS[n % 6], n % 4 < 2)
        for n, r in enumerate(plain)
    ]


def rollouts(markers: Markers, slots: int = 8, **options: object) -> list[Rollout]:
    generator = Generator(model(), slots, temperature=1.0, seed=SEED, markers=markers, **options)
    return list(generator.run(requests()))


def letters(ids: tuple[int, ...] | list[int]) -> str:
    return "".join(map(str, ids))


def forced(request: Request, markers: Markers, ids: list[int]) -> tuple[int | None, int]:
    """What has to follow these tokens of a sample, if anything, and how much was thought in them:
    found in the text from its beginning, by searching for markers."""
    opening, closing = letters(markers.opening), letters(markers.closing)
    text, at, inside, thought = letters(ids), 0, request.thinks, 0
    while True:
        found = text.find(closing if inside else opening, at)
        if found < 0:
            break
        thought += inside * (found - at)
        at, inside = found + len(closing if inside else opening), not inside
    if not inside:
        return None, thought
    thought += len(text) - at
    if request.budget is None or thought < request.budget:
        return None, thought
    written = max(n for n in range(len(closing)) if text[at:].endswith(closing[:n]))
    return markers.closing[written], thought


def check(found: list[Rollout], markers: Markers) -> None:
    """Every token that has to be forced is, and no other."""
    for rollout in found:
        assert len(rollout.chosen) == len(rollout.ids)
        for place, token in enumerate(rollout.ids):
            due, _ = forced(rollout.request, markers, rollout.ids[:place])
            assert rollout.chosen[place] == (due is None)
            assert due in (None, token)


def machine(markers: Markers, rows: int = 300, tokens: int = 30) -> list[Rollout]:
    """Random rows of three symbols, in which everything that can happen to a marker happens."""
    draw = random.Random(0)
    found = [
        Rollout(Request(n, [], tokens, budget=draw.randrange(9), thinks=n % 2 == 1), 0)
        for n in range(rows)
    ]
    of_rows = Thinking(markers, rows, torch.device("cpu"))
    of = [rollout.request for rollout in found]
    of_rows.begin(torch.arange(rows), [r.thinks for r in of], [r.budget for r in of])
    for _ in range(tokens):
        drawn_B = torch.tensor([draw.randrange(3) for _ in found])
        ids_B, chosen_B = of_rows.decide(drawn_B, torch.ones(rows))
        assert torch.equal(ids_B[chosen_B], drawn_B[chosen_B])
        for rollout, token, chosen in zip(found, ids_B.tolist(), chosen_B.tolist(), strict=True):
            rollout.ids.append(token)
            rollout.chosen.append(chosen)
    return found


MACHINES = [Markers((0, 0, 1), (0, 1, 0, 1, 2)), Markers((0,), (1, 1)), Markers((1, 0), (1,))]


@pytest.mark.parametrize("markers", MACHINES)
def test_markers_are_found_as_by_searching_the_whole_text(markers: Markers) -> None:
    check(machine(markers), markers)


@cache
def plain(name: str) -> list[Rollout]:
    return rollouts(MARKERS[name])


@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_is_forced_when_the_budget_is_used_and_else_the_model_decides(name: str) -> None:
    found, exact = plain(name), loud_model(model().config, seed=2).double()
    check(found, MARKERS[name])
    for rollout in found:
        logits_nV, n = full_pass(exact, rollout), len(rollout.ids)
        key = stream(SEED, rollout.request.prompt, rollout.sample)
        ends_nV = logits_nV.softmax(-1).cumsum(-1)
        numbers_n1 = uniforms(torch.full((n,), key), torch.arange(n))[:, None]
        drawn_n, ids_n = (ends_nV <= numbers_n1).sum(-1), torch.tensor(rollout.ids)
        chosen_n = torch.tensor(rollout.chosen)
        assert torch.equal(drawn_n[chosen_n], ids_n[chosen_n])
        own_n = logits_nV.log_softmax(-1)[torch.arange(n), ids_n]
        assert (torch.tensor(rollout.logprobs) - own_n).abs().max() < 1e-4


@pytest.mark.parametrize("name", MARKERS)
def test_the_samples_test_something(name: str) -> None:
    markers, ends = MARKERS[name], {"in thinking": 0, "rest of a marker": 0, "again": 0}
    for rollout in plain(name):
        budget, places = rollout.request.budget, range(len(rollout.ids))
        by_force = [place for place in places if not rollout.chosen[place]]
        _, thought = forced(rollout.request, markers, rollout.ids)
        cut_off = len(by_force) and by_force[-1] == places[-1]  # within a marker
        assert budget is None or thought <= budget + cut_off * len(markers.closing)
        ends["in thinking"] += rollout.ended == "stop" and thought > 0 and not by_force
        ends["again"] += len(by_force) > len(markers.closing)
        ends["rest of a marker"] += any(
            rollout.chosen[i - 1] and rollout.ids[i] != markers.closing[0] for i in by_force if i
        )
    assert ends["in thinking"] > 2
    assert ends["again"] > 0
    assert ends["rest of a marker"] > 0 or name != "of several"


@pytest.mark.parametrize(("slots", "drafts"), [(3, 0), (64, 3)])
def test_the_number_of_slots_does_not_matter(slots: int, drafts: int) -> None:
    markers = MARKERS["of several"]
    some = rollouts(markers, drafts=drafts) if drafts else plain("of several")
    assert texts(rollouts(markers, slots, drafts=drafts)) == texts(some)


# -- With drafts


def greedy(markers: Markers, drafts: int, slots: int = 8) -> list[Rollout]:
    generator = Generator(model(), slots, drafts=drafts, markers=markers)
    return list(generator.run(requests(samples=1)))


@pytest.mark.parametrize(("name", "drafts"), [*zip(MARKERS, [1, 3, 7], strict=True)])
def test_budgets_hold_with_drafts(name: str, drafts: int) -> None:
    markers = MARKERS[name]
    found = rollouts(markers, drafts=drafts)
    check(found, markers)
    assert any(len(set(rollout.passes)) > 1 for rollout in found)
    assert texts(greedy(markers, drafts)) == texts(greedy(markers, 0))


# -- What must be noticed

REAL_READ, REAL_DUE, REAL_MACHINE = Thinking.read, Thinking.due, thinking._machine


def without_falling_back(markers: Markers) -> list[list[tuple[int, int]]]:
    """Whatever is not the next token of a marker begins to look for it anew."""
    starts = (0, len(markers.opening))
    return [
        [
            (to, n) if to in (*starts, state + 1) else (starts[state >= starts[1]], n)
            for to, n in row
        ]
        for state, row in enumerate(REAL_MACHINE(markers))
    ]


def markers_are_thought(markers: Markers) -> list[list[tuple[int, int]]]:
    return [[(to, max(n, 0)) for to, n in row] for row in REAL_MACHINE(markers)]


@pytest.mark.parametrize("broken", [without_falling_back, markers_are_thought])
def test_the_search_notices(broken: object) -> None:
    with patch.object(thinking, "_machine", broken):
        found = machine(MACHINES[0])
    with pytest.raises(AssertionError):
        check(found, MACHINES[0])


def all_of_the_drafts(self: Thinking, ids_BK: Tensor, counts_B: Tensor) -> None:
    REAL_READ(self, ids_BK, torch.full_like(counts_B, ids_BK.shape[1]))


def before_drafts_alone(self: Thinking, ahead_BK: Tensor) -> Tensor:
    due_BS = REAL_DUE(self, ahead_BK)
    due_BS[:, 1:] = FREE
    return due_BS


@pytest.mark.parametrize(
    ("name", "broken"), [("read", all_of_the_drafts), ("due", before_drafts_alone)]
)
def test_the_comparison_notices(name: str, broken: object) -> None:
    markers = MARKERS["of several"]
    with patch.object(Thinking, name, broken):
        found = rollouts(markers, drafts=3)
    with pytest.raises(AssertionError):
        check(found, markers)


def test_a_budget_without_markers_is_refused() -> None:
    with pytest.raises(UserError, match="needs the markers"):
        list(Generator(model(), 2).run([Request(0, [1], 3, budget=5)]))
