"""Prompts to generate from, and texts that a model generates."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence, Set

import torch
from torch import Tensor

from nemo_hybrid.generation.batched import Generator, Request, Rollout
from nemo_hybrid.model.hybrid import HybridLM

Texts = dict[tuple[int | str, int], tuple[list[int], str | None]]


def requests_of(
    count: int,
    lengths: Sequence[int],
    most: Sequence[int],
    stops: Set[int],
    *,
    samples: Iterable[int] = (0,),
    vocabulary: int = 61,
    seed: int = 0,
) -> list[Request]:
    """Random prompts of these lengths in turn, none like another, with one of the limits each;
    every other one stops."""
    draw = random.Random(seed)
    return [
        Request(
            prompt=number,
            ids=[draw.randrange(1, vocabulary) for _ in range(lengths[number % len(lengths)])],
            most=draw.choice(most),
            samples=tuple(samples),
            stops=stops if number % 2 else frozenset(),
        )
        for number in range(count)
    ]


def texts(found: Iterable[Rollout]) -> Texts:
    """Tokens by prompt and sample, and how they ended."""
    return {(r.request.prompt, r.sample): (r.ids, r.ended) for r in found}


def full_pass(of: HybridLM, rollout: Rollout) -> Tensor:
    """Logits [n, V] before each of a rollout's tokens, by the forward pass over the whole text."""
    text = torch.tensor([[*rollout.request.ids, *rollout.ids]])
    return of(text).logits[0, len(rollout.request.ids) - 1 : -1]


def greedy(model: HybridLM, prompt_BS: Tensor, new: int, slots: int = 64) -> Tensor:
    """The most probable tokens [B, new] after prompts of one length."""
    requests = [Request(row, ids, new) for row, ids in enumerate(prompt_BS.tolist())]
    by_row = {r.request.prompt: r.ids for r in Generator(model, slots).run(requests)}
    return torch.tensor([by_row[row] for row in range(len(prompt_BS))])
