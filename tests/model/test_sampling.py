"""Drawing of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.generation.sampling import generate, sample

PROBABILITIES = [0.4, 0.25, 0.2, 0.1, 0.05]
DRAWS = 20_000


def shares(temperature: float, top_p: float, seed: int = 0) -> Tensor:
    """How often each of five tokens is drawn from PROBABILITIES in DRAWS draws."""
    logits_BV = torch.tensor(PROBABILITIES).log().add(3.0).expand(DRAWS, -1)
    generator = torch.Generator().manual_seed(seed)
    ids_B = sample(logits_BV, temperature, top_p, generator)
    assert ids_B.shape == (DRAWS,)
    return torch.bincount(ids_B, minlength=5) / DRAWS


def surprise(observed: Tensor, probabilities: list[float]) -> float:
    """Chi-square per degree of freedom over tokens that can occur; infinite if others did."""
    p = torch.tensor(probabilities)
    p = p / p.sum()
    if observed[p == 0].any():
        return float("inf")
    chi = DRAWS * ((observed - p).square() / p)[p > 0].sum()
    return float(chi) / max(1, int((p > 0).sum()) - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    expected = [p ** (1 / temperature) for p in PROBABILITIES]
    assert surprise(shares(temperature, 1.0), expected) < 4
    assert surprise(shares(temperature * 1.2, 1.0), expected) > 20


@pytest.mark.parametrize(
    ("top_p", "support"),
    [(0.3, 1), (0.399, 1), (0.401, 2), (0.649, 2), (0.651, 3), (0.951, 5)],
)
def test_top_p_draws_from_the_fewest_most_probable_tokens(top_p: float, support: int) -> None:
    expected = [p if i < support else 0.0 for i, p in enumerate(PROBABILITIES)]
    observed = shares(1.0, top_p)
    assert int((observed > 0).sum()) == support
    assert surprise(observed, expected) < 4


def test_top_p_applies_after_the_temperature() -> None:
    """At temperature 2 the first token has 0.296, so 0.35 needs two; at 1 it has 0.4."""
    assert int((shares(2.0, 0.35) > 0).sum()) == 2
    assert int((shares(1.0, 0.35) > 0).sum()) == 1


def test_sampling_edge_cases() -> None:
    tied_BV = torch.zeros(100, 4)
    assert set(sample(tied_BV, 1.0, 0.5).tolist()) == {0, 1}  # ties keep the smaller ids
    assert sample(tied_BV, 1.0, 1e-9).tolist() == [0] * 100
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits_BV, 0.0, 1.0), logits_BV.argmax(-1))
    for temperature in (1e-3, 1e-10, 1e-40, 1e-300):  # ever more careful, never broken
        assert torch.equal(sample(logits_BV * 1e3, temperature, 1.0), logits_BV.argmax(-1))
    never_BV = torch.tensor([[0.0, float("-inf"), 0.0]]).expand(200, -1)
    assert set(sample(never_BV, 1.0, 1.0).tolist()) == {0, 2}
    assert set(sample(never_BV, 1.0, 0.999).tolist()) == {0, 2}


def test_the_seed_decides_the_draws() -> None:
    model = loud_model(tiny_config("M*"))
    prompt_BS = random_ids(model.config, 2, 5)

    def draw(seed: int) -> list[list[int]]:
        return [ids.tolist() for ids in generate(model, prompt_BS, 12, temperature=1.0, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(draw(1)) == 12
    assert list(generate(model, prompt_BS, 0)) == []
