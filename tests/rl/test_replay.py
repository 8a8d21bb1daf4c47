"""Router replay: training sends tokens to the experts that they went to when they were sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import log

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.bands import SABOTAGE, band
from helpers.generated import requests_of
from helpers.tiny_models import loud_model, smallest_routing_margin, tiny_config
from nemo_hybrid.config.rl import PolicyOptions
from nemo_hybrid.generation.batched import Generator, Rollout
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import LatentMoE
from nemo_hybrid.model.recompute import recompute_layers
from nemo_hybrid.model.router import Router
from nemo_hybrid.recipes.answers import Answer, Key, Packed
from nemo_kernels.documents import Tile

PATTERN, VOCABULARY, LENGTH = "ME*-ME", 512, 96
CLOSE = 2e-5  # see tests/generation/test_batched.py
Experts = dict[Key, NDArray[np.int16]]


def loud(**changes: object) -> HybridLM:
    return loud_model(tiny_config(PATTERN, vocab_size=VOCABULARY, **changes))


@cache
def exact() -> HybridLM:
    return loud(mtp_num_depths=1, mtp_pattern="*E").requires_grad_(False)


@cache
def rounded() -> HybridLM:
    return loud().bfloat16().requires_grad_(False)


def sampled(model: HybridLM, slots: int = 16, drafts: int = 0) -> list[Rollout]:
    requests = requests_of(
        12, [1, 7, 8, 9, 26], [1, 12, 30], frozenset({7, 8, 9}), samples=range(2),
        vocabulary=VOCABULARY,
    )  # fmt: skip
    generator = Generator(model, slots, temperature=1.0, seed=3, drafts=drafts, experts=True)
    return sorted(generator.run(requests), key=lambda r: (r.request.prompt, r.sample))


def packed(rollouts: Sequence[Rollout]) -> tuple[Packed, Experts]:
    """Rows of several answers each, and the experts of these."""
    rows: list[list[Answer]] = [[]]
    experts = {}
    for rollout in rollouts:
        answer = Answer(
            prompt=rollout.request.prompt, sample=rollout.sample, environment="",
            ids=[*rollout.request.ids, *rollout.ids],
            new=len(rollout.ids), logprobs=rollout.logprobs, chosen=rollout.chosen, ended="stop",
            reward=1.0, advantage=1.0,
        )  # fmt: skip
        if sum(len(a.ids) for a in rows[-1]) + len(answer.ids) > LENGTH:
            rows.append([])
        rows[-1].append(answer)
        assert rollout.experts is not None
        experts[answer.key] = rollout.experts
    assert len(rows) > 2
    return Packed(rows, PolicyOptions(), LENGTH, pad_id=0), experts


def apart(model: HybridLM, batch: Packed) -> tuple[float, float]:
    """Mean and largest exp|difference of log-probabilities| between sampling and training."""
    batch.measure(model, first=True)
    batch.weighted()
    return batch.sums["apart"] / batch.sums["tokens"], batch.sums["apart_max"]


@contextmanager
def watched(model: HybridLM) -> Iterator[list[Tensor]]:
    """Where each MoE layer of the backbone sends tokens, [T, K] in the order of ids."""
    seen: list[Tensor] = []

    def look(router: Router, inputs: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        seen.append(out[0].sort(-1)[0])

    gates = [m.gate for m in model.backbone.modules() if isinstance(m, LatentMoE)]
    handles = [gate.register_forward_hook(look) for gate in gates]
    yield seen
    for handle in handles:
        handle.remove()


def flips(model: HybridLM, batch: Packed, experts: Experts) -> int:
    """Choices of tokens in layers that are others in training than they were in sampling."""
    with watched(model) as seen:
        batch.measure(model, first=True)
    recorded = Packed(batch.rows, PolicyOptions(), LENGTH, pad_id=0)
    recorded.route(experts)
    assert recorded.experts_BSLK is not None
    ids_TLK = recorded.experts_BSLK.flatten(0, 1).long().sort(-1)[0]
    there_T = ids_TLK[:, 0, 0] >= 0
    assert int(there_T.sum()) == sum(map(len, experts.values()))
    pairs = zip(seen, ids_TLK.unbind(1), strict=True)
    return sum(int((now != then).any(-1)[there_T].sum()) for now, then in pairs)


def test_in_bf16_replay_removes_the_choice_of_other_experts() -> None:
    batch, experts = packed(sampled(rounded()))
    assert flips(rounded(), batch, experts) > 0
    mean, most = apart(rounded(), batch)
    assert mean <= 1.05
    assert log(most) > 0.1
    batch.route(experts)
    assert flips(rounded(), batch, experts) == 0
    mean, most = apart(rounded(), batch)
    assert mean <= 1.02
    assert log(most) <= 0.1
    # Experts of the token before, as of an engine that counts otherwise, are worse than none.
    batch.route({name: np.roll(of, 1, 0) for name, of in experts.items()})
    assert apart(rounded(), batch)[0] > 1.2


@pytest.mark.parametrize(("slots", "drafts"), [(16, 0), (3, 0), (5, 3)])
def test_rollouts_know_the_experts_of_their_tokens(slots: int, drafts: int) -> None:
    """The oracle: the routers of a pass over the whole text."""
    model = exact()
    for rollout in sampled(model, slots, drafts):
        text = torch.tensor([[*rollout.request.ids, *rollout.ids]])[:, :-1]
        assert smallest_routing_margin(model, text) > CLOSE
        with watched(model) as seen:
            model(text)
        assert rollout.experts is not None
        assert rollout.experts.dtype == np.int16
        ids_TLK = torch.from_numpy(rollout.experts).long().sort(-1)[0]
        assert torch.equal(torch.stack(seen, 1), ids_TLK)


def test_who_does_not_ask_gets_none() -> None:
    requests = requests_of(2, [4], [3], frozenset())
    assert all(r.experts is None for r in Generator(exact(), 2).run(requests))


def test_weights_are_of_the_scores_of_the_experts_that_are_given() -> None:
    """The oracle: expert by expert in fp64; and the gradients of its weights by autograd."""
    layer = loud().double().backbone.layers[1].mixer
    assert isinstance(layer, LatentMoE)
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    draws = torch.rand(2, 5, 8, generator=generator)
    given_BSK = draws.topk(3).indices.short()
    given_BSK[1, 4] = -1  # for which the router decides

    def naive(scaled: bool = True) -> Tensor:
        gate, experts = layer.gate, layer.experts
        x_TD = x_BSD.flatten(0, 1)
        scores_TE = (x_TD @ gate.weight.double().t()).sigmoid()
        own_TK = (scores_TE + gate.e_score_correction_bias).topk(3).indices
        ids_TK = torch.where(given_BSK.flatten(0, 1) < 0, own_TK, given_BSK.flatten(0, 1).long())
        out = []
        for x_D, scores_E, ids_K in zip(x_TD, scores_TE, ids_TK, strict=True):
            share_K = scores_E[ids_K] / (scores_E[ids_K].sum() if scaled else 1)
            h_L = layer.fc1_latent_proj(x_D)
            sums = [
                gate.scaling * share * experts.down_proj[e] @ (experts.up_proj[e] @ h_L).relu() ** 2
                for share, e in zip(share_K, ids_K, strict=True)
            ]
            out.append(layer.fc2_latent_proj(torch.stack(sums).sum(0)) + layer.shared_experts(x_D))
        return torch.stack(out).view_as(x_BSD)

    def results(y_BSD: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(y_BSD.square().sum(), list(layer.parameters()))
        return [y_BSD.detach(), *gradients]

    ours = results(layer(x_BSD, Tile(None, given_BSK))[0])
    free = results(layer(x_BSD)[0])
    # Scores and weights are fp32 numbers in the layer.
    for one, other, without in zip(ours, results(naive()), free, strict=True):
        size, within = other.norm(), band(torch.float32, one.numel())
        assert (one - other).norm() < within * size
        assert (without - other).norm() > SABOTAGE * within * size


def test_the_backward_pass_of_recomputed_layers_knows_them() -> None:
    batch, experts = packed(sampled(rounded()))
    batch.route(experts)

    def gradients(letters: str, replay: bool) -> list[Tensor]:
        model = loud().requires_grad_(True)
        recompute_layers(model, letters)
        routed = batch.experts_BSLK if replay else None
        h_BSD, stats = model.forward_hidden(batch.batch.ids_BS, batch.batch.packing, routed)
        counts = [one.counts_BE for layer in stats.values() for one in layer]
        found = torch.autograd.grad(h_BSD.square().sum(), list(model.backbone.layers.parameters()))
        return [*counts, *found]

    plain, again, free = gradients("", True), gradients("ME*-", True), gradients("", False)
    assert all(map(torch.equal, plain, again))
    assert not torch.equal(plain[0], free[0])
